"""Copies into an arena through its files."""

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch import Tensor  # noqa: E402

from services.worker.engine.torch_engine.arena import Arena  # noqa: E402
from services.worker.engine.torch_engine.file_copy import RUNS_MAX, written  # noqa: E402

pytestmark = pytest.mark.torch

_CPU = torch.device("cpu")


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


SHAPES: dict[str, Callable[[], Tensor]] = {
    "whole": lambda: _noise(300, 200),
    "vector": lambda: _noise(777),
    "rows": lambda: _noise(300, 200)[17:291],
    "columns": lambda: _noise(300, 400)[:, 130:330],
    "more rows than one call takes": lambda: _noise(2 * RUNS_MAX + 3, 300)[:, 100:230],
    "one column of rows": lambda: _noise(5, 9, 400)[2, :, 10:390],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_arrives_and_no_other(shape: str) -> None:
    """Otherwise a replica would speak nonsense after a switch, or its neighbour tensor would."""
    values, arena = SHAPES[shape](), Arena("t")
    names = [f"model.layers.0.{name}.weight" for name in ("before", "target", "after")]
    before, target, after = (
        arena.allocate((len(values) + 4, *values.shape[1:]), torch.float32, _CPU, name)
        for name in names
    )
    for tensor in (before, target, after):
        tensor.fill_(7.0)
    assert written(arena, target[2:-2], values)
    assert torch.equal(target[2:-2], values)
    for tensor in (before, after, target[:2], target[-2:]):
        assert bool((tensor == 7.0).all())


def test_what_a_file_cannot_take_is_left_to_others() -> None:
    """Otherwise it would be written as if it lay one after another."""
    arena, values = Arena("t"), _noise(300, 200)
    target = arena.allocate((300, 400), torch.float32, _CPU, "w")
    assert not written(arena, target[:, :200], values), "a target with gaps"
    target = arena.allocate((200, 300), torch.float32, _CPU, "v")
    assert not written(arena, target, values.t()), "every element elsewhere"
    assert not written(arena, torch.zeros(300, 200), values), "no file behind it"
    target = arena.allocate((300, 200), torch.bfloat16, _CPU, "u")
    assert not written(arena, target, values), "another type"
    assert not bool(target.any())

"""Reading checkpoint folders: what they hold, and what is said of bad ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from services.worker.engine.torch_engine.checkpoint import Checkpoint  # noqa: E402
from services.worker.engine.torch_engine.make_model import make_model  # noqa: E402
from services.worker.engine.torch_engine.model_config import read_model_config  # noqa: E402
from services.worker.engine.torch_engine.rope import inverse_frequencies  # noqa: E402
from services.worker.engine.torch_engine.weights import allocate_weights  # noqa: E402
from shared.errors import ConfigInvalid  # noqa: E402
from shared.placement.sheets import Rank  # noqa: E402
from tests.unit.engine_contract import run  # noqa: E402
from tests.unit.torch_oracle import (  # noqa: E402
    copy_folder,
    greedy_request,
    load,
    load_file,
    make_oracle,
    prompt_of,
    save_file,
)

pytestmark = pytest.mark.torch
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make_model(folder)
    return folder


def edit(name: str, **changes: object) -> Spoil:
    """Set fields of a JSON file; None removes one."""

    def spoil(folder: Path) -> None:
        value: dict[str, Any] = json.loads((folder / name).read_text())
        value.update(changes)
        kept = {key: item for key, item in value.items() if item is not None}
        (folder / name).write_text(json.dumps(kept))

    return spoil


def rewrite(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


CONFIG = "config.json"
NORM = "model.norm.weight"
BAD: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "config.json is missing"),
    "not json": (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
    "not an object": (lambda f: (f / CONFIG).write_text("[]"), "JSON object"),
    "architecture": (edit(CONFIG, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "no architecture": (edit(CONFIG, architectures=None), "LlamaForCausalLM"),
    "no layers": (edit(CONFIG, num_hidden_layers=None), "num_hidden_layers"),
    "text for a number": (edit(CONFIG, hidden_size="192"), "hidden_size"),
    "kv heads": (edit(CONFIG, num_key_value_heads=3), "num_key_value_heads"),
    "activation": (edit(CONFIG, hidden_act="gelu"), "hidden_act"),
    "quantised": (edit(CONFIG, quantization_config={"bits": 4}), "quantization_config"),
    "yarn": (edit(CONFIG, rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),
    "rope fields": (edit(CONFIG, rope_scaling={"type": "linear"}), "rope_scaling: factor"),
    "partial rope": (edit(CONFIG, partial_rotary_factor=0.5), "partial_rotary_factor"),
    "dtype": (edit(CONFIG, torch_dtype="int8"), "int8"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "pickled": (pickled, "convert the weights to safetensors"),
    "truncated": (truncate, "truncated"),
    "missing tensor": (rewrite(lambda t: t.pop(NORM)), NORM),
    "wrong shape": (rewrite(lambda t: t.update({NORM: torch.ones(7)})), r"\(192,\)"),
    "unknown tensor": (
        rewrite(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(192)})),
        "q_proj.bias",
    ),
    "index without file": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
        ),
        "model-00001-of-00002.safetensors is missing",
    ),
    "index without map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "weight_map",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_says_what_is_wrong(sound: Path, tmp_path: Path, name: str) -> None:
    """Otherwise an operator would meet a stack trace, or a model that talks nonsense."""
    spoil, expected = BAD[name]
    folder = copy_folder(sound, tmp_path / "bad")
    spoil(folder)
    with pytest.raises(ConfigInvalid, match=expected):
        load(folder)


def test_absent_folder_says_so(tmp_path: Path) -> None:
    """Otherwise a typing error in the path would look like a damaged model."""
    with pytest.raises(ConfigInvalid, match=r"config\.json is missing"):
        load(tmp_path / "absent")


def test_split_checkpoint_equals_single_file(tmp_path: Path) -> None:
    """Otherwise big models, which always come in several files, would not load."""
    single = make_oracle(tmp_path / "single", "llama")
    split = make_oracle(tmp_path / "split", "llama", max_shard_size="100KB")
    assert (split.folder / "model.safetensors.index.json").is_file()
    request = greedy_request("a", prompt_of(20), 10)
    assert run(load(single.folder), request) == run(load(split.folder), request)


def test_old_and_new_spelling_of_rope_agree(tmp_path: Path) -> None:
    """Otherwise a checkpoint would change its text with the library that saved it."""
    scaling = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    make_model(tmp_path)
    edit(CONFIG, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})(tmp_path)
    old = read_model_config(tmp_path).rope
    edit(
        CONFIG, rope_theta=None, rope_scaling=None,
        rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling},
    )(tmp_path)  # fmt: skip
    assert read_model_config(tmp_path).rope == old
    assert old.theta == 5e5
    assert inverse_frequencies(old, 32)[-1] < 1 / 5e5 ** (30 / 32)


def test_sliding_window_bounds_the_context(sound: Path, tmp_path: Path) -> None:
    """Otherwise a windowed model would attend to what it must not see, unnoticed."""
    folder = copy_folder(sound, tmp_path / "mistral")
    edit(CONFIG, architectures=["MistralForCausalLM"], sliding_window=64)(folder)
    with pytest.raises(ConfigInvalid, match="sliding window of 64"):
        load(folder)
    load(folder, context_tokens_max=64).close()


def test_qwen_window_counts_only_when_used(sound: Path, tmp_path: Path) -> None:
    """Otherwise ordinary Qwen2 checkpoints, which name a window they do not use, would fail."""
    folder = copy_folder(sound, tmp_path / "qwen")
    edit(CONFIG, architectures=["Qwen2ForCausalLM"], sliding_window=64)(folder)
    assert read_model_config(folder).sliding_window is None
    edit(CONFIG, use_sliding_window=True)(folder)
    assert read_model_config(folder).sliding_window == 64


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 2), (8, 4)])
def test_ranks_load_their_slices_of_the_files(sound: Path, tp: int, pp: int) -> None:
    """Otherwise ranks of a bigger replica would compute with another rank's weights."""
    model = read_model_config(sound)
    full = load_file(sound / "model.safetensors")
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            rank = Rank(tp_rank=tp_rank, tp=tp, pp_rank=pp_rank, pp=pp)
            weights = allocate_weights(model, rank, dtype=torch.float32, device=torch.device("cpu"))
            Checkpoint(sound).load((shard, weights.named[shard.name]) for shard in weights.shards)
            for shard in weights.shards:
                assert torch.equal(weights.named[shard.name], full[shard.name][shard.index])


def test_settings_that_contradict_the_model_are_refused(sound: Path) -> None:
    """Otherwise the engine would run with positions that the model never learnt, or not start
    and leave the operator guessing."""
    for settings, field in (
        ({"context_tokens_max": 9000}, "context_tokens_max"),
        ({"kv_memory_bytes": 10}, "kv_memory_bytes"),
        ({"device": "cuda:99"}, "device"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "int4"}, "dtype"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"threads": -1}, "threads"),
        ({"batch_tokens_max": 3, "running_max": 4}, "batch_tokens_max"),
    ):
        with pytest.raises(ConfigInvalid) as refused:
            load(sound, **settings)
        assert refused.value.field == field

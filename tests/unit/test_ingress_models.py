"""The models that clients may name."""

from pathlib import Path

import pytest

from services.ingress.models import ServedModels
from services.ingress.openai_errors import ApiError
from shared.errors import ConfigInvalid
from shared.models import ModelSpec
from shared.text import byte_tokenizer
from tests.checkpoints import byte_level, sentencepiece, with_bos, write_folder

TEXT = "the the a"


def test_each_model_has_its_own_tokenizer(tmp_path: Path) -> None:
    """A prompt would reach a model as another model's tokens: fluent nonsense, no error."""
    one = write_folder(tmp_path / "one", with_bos(byte_level()))
    two = write_folder(tmp_path / "two", sentencepiece())
    models = ServedModels(
        [
            ModelSpec(model_id="one", path=one),
            ModelSpec(model_id="org/two", path=two, context_tokens_max=99),
            ModelSpec(model_id="bytes"),
        ]
    )
    assert models.ids == ("one", "org/two", "bytes")
    tokens = {
        name: models.named(name).tokenizer.encode(TEXT, add_special_tokens=True)
        for name in models.ids
    }
    assert len({tuple(ids) for ids in tokens.values()}) == 3
    assert tokens["bytes"] == byte_tokenizer().encode(TEXT, add_special_tokens=True)
    assert models.named("org/two").spec.context_tokens_max == 99


def test_models_of_one_folder_share_its_tokenizer(tmp_path: Path) -> None:
    """Each further name of a checkpoint would cost a second at start, and its memory."""
    folder = write_folder(tmp_path / "one", byte_level())
    specs = [ModelSpec(model_id=name, path=folder) for name in ("short", "long")]
    models = ServedModels(specs)
    assert models.named("short").tokenizer is models.named("long").tokenizer


def test_an_unknown_model_is_told_what_is_served() -> None:
    """A client with a typo would search for it in vain."""
    models = ServedModels([ModelSpec(model_id="a"), ModelSpec(model_id="b")])
    with pytest.raises(ApiError) as caught:
        models.named("A")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert caught.value.param == "model"
    assert "'A'" in caught.value.message
    assert caught.value.message.endswith("Served: a, b.")


def test_a_folder_without_tokenizer_stops_the_start(tmp_path: Path) -> None:
    """The ingress would start, and fail on the first request for that model."""
    specs = [ModelSpec(model_id="a"), ModelSpec(model_id="b", path=str(tmp_path))]
    with pytest.raises(ConfigInvalid):
        ServedModels(specs)

"""The models that clients may name, each with its tokenizer."""

from collections.abc import Iterable
from dataclasses import dataclass

from services.ingress.openai_errors import model_not_found
from shared.models import ModelSpec
from shared.text import Tokenizer, byte_tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    spec: ModelSpec
    tokenizer: Tokenizer


class ServedModels:
    """The topology's models. Their tokenizers are shared where the folder is, since a large
    vocabulary takes a second to read and tens of megabytes to hold."""

    def __init__(self, specs: Iterable[ModelSpec]) -> None:
        """Reads the tokenizers; raises ConfigInvalid."""
        tokenizers: dict[str, Tokenizer] = {}
        self._models: dict[str, ServedModel] = {}
        for spec in specs:
            if spec.path not in tokenizers:
                tokenizers[spec.path] = _tokenizer(spec.path)
            self._models[spec.model_id] = ServedModel(spec, tokenizers[spec.path])

    @property
    def ids(self) -> tuple[str, ...]:
        """In the topology's order: the first is what tools take that were told none."""
        return tuple(self._models)

    def named(self, model_id: str) -> ServedModel:
        """Raises ApiError 404 for a model that is not served here."""
        model = self._models.get(model_id)
        if model is None:
            raise model_not_found(model_id, self.ids)
        return model


def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path) if path else byte_tokenizer()

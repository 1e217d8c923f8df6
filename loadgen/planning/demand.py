"""What a plan is asked for: each model's types, with rates, lengths and SLO classes."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from services.scheduler.policies.interface import ModelDemand

HORIZON_S = 3600.0
"""For how long a demand that somebody wrote down is taken to last, where the file does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """``names``: what a type is called, by model and number; ``source``: where all this comes from,
    and ``notes`` what was done to it on the way."""

    models: tuple[ModelDemand, ...]
    names: Mapping[tuple[str, str], str]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def arrivals_rps(self) -> float:
        return sum(model.arrivals_rps for model in self.models)

    @property
    def horizon_s(self) -> float:
        """For how long it is expected: the longest of its models'."""
        return max((model.horizon_s for model in self.models), default=HORIZON_S)

    def name(self, model_id: str, number: str) -> str:
        """A type in words; "*" are all types of a model of which nothing is expected."""
        return self.names.get((model_id, number), number)

    def scaled(self, times: float) -> "Expected":
        """The same mix, ``times`` as much of it."""
        if times == 1.0:
            return self
        models = tuple(_scaled(model, times) for model in self.models)
        return Expected(models=models, names=self.names, source=self.source, notes=self.notes)

    def of(self, model_ids: tuple[str, ...]) -> "Expected":
        """With an entry for each of ``model_ids``, in their order: nothing where none was said."""
        known = {model.model_id: model for model in self.models}
        models = tuple(
            known.get(name) or ModelDemand(model_id=name, types=(), horizon_s=self.horizon_s)
            for name in model_ids
        )
        return Expected(models=models, names=self.names, source=self.source, notes=self.notes)


def _scaled(model: ModelDemand, times: float) -> ModelDemand:
    def more(rate: float | None) -> float | None:
        return None if rate is None else rate * times

    types = tuple(
        msgspec.structs.replace(
            kind,
            arrivals_rps=kind.arrivals_rps * times,
            arrivals_rps_p10=more(kind.arrivals_rps_p10),
            arrivals_rps_p90=more(kind.arrivals_rps_p90),
        )
        for kind in model.types
    )
    return ModelDemand(model_id=model.model_id, types=types, horizon_s=model.horizon_s)

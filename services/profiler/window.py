"""Sums over one window of one model: what a DemandReport is made of, in constant memory."""

from collections import Counter
from dataclasses import dataclass, field
from math import expm1

from services.profiler.kmeans import Centre
from shared.messages.demand import TypeDemand
from shared.messages.requests import Outcome, RequestCompleted
from shared.slo import SloClass

USUAL: SloClass = "standard"


@dataclass(slots=True)
class TypeSums:
    """``requests`` completed; ``others`` arrived too, but were aborted, rejected or failed.
    ``unusual`` counts completed ones of other SLO classes than the usual one."""

    requests: int = 0
    others: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float = 0.0
    ttfts: int = 0
    tpot_s: float = 0.0
    tpots: int = 0
    unusual: Counter[str] = field(default_factory=Counter[str])

    def add(self, done: RequestCompleted) -> None:
        self.requests += 1
        self.input_tokens += done.input_tokens
        self.output_tokens += done.output_tokens
        if done.slo_class != USUAL:
            self.unusual[done.slo_class] += 1
        if done.ttft_s is not None:
            self.ttft_s += done.ttft_s
            self.ttfts += 1
        if done.tpot_s is not None:
            self.tpot_s += done.tpot_s
            self.tpots += 1

    def absorb(self, other: "TypeSums") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def demand(self, number: int, centre: Centre, *, window_s: float) -> TypeDemand:
        """This type's line of the report; without requests its lengths are the centre's."""
        input_centroid, output_centroid = expm1(centre.x), expm1(centre.y)
        count = self.requests
        return TypeDemand(
            request_type=number,
            requests=count,
            arrivals_rps=(count + self.others) / window_s,
            input_tokens_mean=self.input_tokens / count if count else input_centroid,
            output_tokens_mean=self.output_tokens / count if count else output_centroid,
            input_tokens_centroid=input_centroid,
            output_tokens_centroid=output_centroid,
            ttft_s_mean=self.ttft_s / self.ttfts if self.ttfts else None,
            tpot_s_mean=self.tpot_s / self.tpots if self.tpots else None,
            class_shares=self._class_shares(),
        )

    def _class_shares(self) -> dict[str, float]:
        """Empty when all were of the usual class."""
        if not self.unusual:
            return {}
        counts = {USUAL: self.requests - self.unusual.total(), **self.unusual}
        return {name: n / self.requests for name, n in sorted(counts.items()) if n}


@dataclass(slots=True)
class Window:
    """One model's window. ``request_ids`` tell a repeated message from a new request."""

    sums: dict[int, TypeSums] = field(default_factory=dict[int, TypeSums])
    outcomes: dict[Outcome, int] = field(default_factory=dict[Outcome, int])
    request_ids: set[str] = field(default_factory=set[str])
    dropped: int = 0

    def of(self, number: int) -> TypeSums:
        sums = self.sums.get(number)
        if sums is None:
            sums = self.sums[number] = TypeSums()
        return sums

    def merge(self, number: int, into: int) -> None:
        self.of(into).absorb(self.sums.pop(number, TypeSums()))

    def count(self, outcome: Outcome) -> int:
        return self.outcomes.get(outcome, 0)

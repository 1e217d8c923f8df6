"""What the next step of an engine computes, foreseen from the rules that our engines share.

A step decodes one token of each request that has its prompt done; what is left of the token budget
goes to prompts in order of arrival, those begun first. An engine does not say what it computed,
only which requests got a token, so each step's outcome is held against the foresight: an engine
that schedules otherwise is found out instead of being fitted wrongly. Pure.
"""

from dataclasses import dataclass

from shared.cost.step import Prefill, pairs
from shared.errors import OServeError


class SweepFailed(OServeError):
    """The engine cannot be measured as it is run; says what to change."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """All that the cost model asks of a step: ``context`` as ``StepModel.step_ps`` takes it."""

    batch: int
    context: int
    prefill: Prefill

    @property
    def tokens(self) -> int:
        return self.batch + self.prefill.tokens

    @property
    def sampled(self) -> int:
        """Requests that get a token."""
        return self.batch + self.prefill.ending


@dataclass(slots=True)
class _Live:
    prompt: int
    computed: int = 0


class Ledger:
    """The live requests of one engine and how far each is."""

    def __init__(self, *, batch_tokens_max: int) -> None:
        self._budget = batch_tokens_max
        self._live: dict[str, _Live] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._live)

    @property
    def keys(self) -> list[str]:
        return list(self._live)

    @property
    def prefilling(self) -> bool:
        return any(live.computed < live.prompt for live in self._live.values())

    def add(self, key: str, prompt_tokens: int) -> None:
        assert key not in self._live, key
        self._live[key] = _Live(prompt_tokens)

    def remove(self, key: str) -> None:
        del self._live[key]

    def advance(self) -> tuple[StepShape, set[str]]:
        """Take the next step: its shape, and the requests that get a token in it."""
        sampled = {key for key, live in self._live.items() if live.computed >= live.prompt}
        context = 0
        for key in sampled:
            self._live[key].computed += 1
            context += self._live[key].computed
        batch = len(sampled)
        budget = self._budget - batch
        tokens = chunks = pair_count = ending = 0
        for key, live in self._live.items():
            count = min(budget, live.prompt - live.computed)
            if count <= 0:
                continue
            pair_count += pairs(live.computed, count)
            live.computed += count
            budget -= count
            tokens += count
            chunks += 1
            if live.computed == live.prompt:
                ending += 1
                sampled.add(key)
        return StepShape(batch, context, Prefill(tokens, chunks, pair_count, ending)), sampled

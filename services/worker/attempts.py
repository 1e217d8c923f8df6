"""Attempts as an engine's host knows them, and as they travel from one leader to another."""

from dataclasses import dataclass

from services.worker.engine.interface import EngineRequest, LiveState
from services.worker.events import Admission, LiveAttempt
from shared.messages.requests import RequestState, SubmitRequest
from shared.placement.spread import target_of
from shared.slo import SloClass
from shared.subjects import TOKEN_CHUNKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Where an admitted request's chunks go, and what its engine need not know of it."""

    request_id: str
    attempt: int
    ingress_id: str
    slo_class: SloClass
    request_type: int
    subject: str

    @classmethod
    def of(cls, request: SubmitRequest | RequestState) -> "Attempt":
        return cls(
            request_id=request.request_id,
            attempt=request.attempt,
            ingress_id=request.ingress_id,
            slo_class=request.slo_class,
            request_type=request.request_type,
            subject=TOKEN_CHUNKS.pattern.replace("{ingress_id}", request.ingress_id),
        )

    @property
    def key(self) -> str:
        """Its name to any engine."""
        return f"{self.request_id}/{self.attempt}"

    def told(self, key: str) -> LiveAttempt:
        return LiveAttempt(
            request_id=self.request_id,
            attempt=self.attempt,
            ingress_id=self.ingress_id,
            key=key,
        )

    def leaves_as(self, state: LiveState, *, whole: bool) -> RequestState:
        """For whoever takes the request over; unless ``whole``, without its tokens."""
        prompt, output = state.request.prompt_tokens, state.output_tokens
        return RequestState(
            request_id=self.request_id,
            attempt=self.attempt,
            ingress_id=self.ingress_id,
            prompt_tokens=prompt if whole else [],
            sampling=state.request.sampling,
            output_tokens=output if whole else [],
            counts=(0, 0) if whole else (len(prompt), len(output)),
            slo_class=self.slo_class,
            request_type=self.request_type,
            computed=state.computed,
            blocks=state.blocks,
            admission=state.admission,
        )

    def target(self, rows: dict[str, dict[str, float]]) -> str:
        """The replica that takes it over by these shares."""
        return target_of(self.request_id, self.request_type, rows)


def engine_request_of(admission: Admission) -> EngineRequest:
    request = admission.request
    return EngineRequest(
        key=admission.key,
        prompt_tokens=request.prompt_tokens,
        sampling=request.sampling,
        output_tokens=request.output_tokens,
    )


def arrives_as(state: RequestState) -> LiveState:
    """For the engine that takes the request over. Zeros stand for tokens that were left out."""
    prompt_count, output_count = state.counts
    output = state.output_tokens or [0] * output_count
    request = EngineRequest(
        key=f"{state.request_id}/{state.attempt}",
        prompt_tokens=state.prompt_tokens or [0] * prompt_count,
        sampling=state.sampling,
        output_tokens=output,
    )
    return LiveState(
        request=request,
        output_tokens=output,
        computed=state.computed,
        blocks=state.blocks,
        admission=state.admission,
    )

"""What the ingress core says about a journey: to routers, and to its replica's worker."""

from collections.abc import Iterable

from services.ingress.handover import holders
from services.ingress.journey import Journey
from shared import subjects
from shared.core import Publish
from shared.messages.requests import AbortRequest, RouteRequest, SubmitRequest


def question(journey: Journey) -> RouteRequest:
    """For what is left of it: the tokens so far are input to whoever goes on."""
    return RouteRequest(
        request_id=journey.request_id,
        model_id=journey.model_id,
        input_tokens=len(journey.prompt_tokens) + len(journey.tokens),
        output_tokens_max=journey.sampling.output_tokens_max - len(journey.tokens),
        slo_class=journey.slo_class,
        tenant=journey.tenant,
        prefix_hashes=journey.prefix_hashes,
        excluded=journey.excluded,
        attempt=journey.attempt,
    )


def submission(journey: Journey, *, ingress_id: str) -> Publish:
    submit = SubmitRequest(
        request_id=journey.request_id,
        attempt=journey.attempt,
        ingress_id=ingress_id,
        epoch=journey.epoch,
        replica_id=journey.replica_id,
        prompt_tokens=journey.prompt_tokens,
        sampling=journey.sampling,
        output_tokens=journey.tokens,
        slo_class=journey.slo_class,
        request_type=journey.request_type,
    )
    return subjects.SUBMIT_REQUEST.send(submit, worker_id=journey.leader_id)


def aborts(journey: Journey, now_s: float) -> Iterable[Publish]:
    """Of the attempt in progress, to whoever may be at work on it."""
    for home in holders(journey, now_s):
        message = AbortRequest(
            request_id=journey.request_id, attempt=journey.attempt, replica_id=home.replica_id
        )
        yield subjects.ABORT_REQUEST.send(message, worker_id=home.leader_id)

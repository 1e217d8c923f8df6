"""The facts of an ended request, for whoever learns from them."""

from services.ingress.journey import Journey
from shared.messages.requests import Outcome, RequestCompleted
from shared.slo import tpot_s


def completed(journey: Journey, now_s: float) -> RequestCompleted:
    """Of a request that ended at ``now_s``, however it did."""
    ttft_s = None
    if journey.first_token_s is not None:
        ttft_s = journey.first_token_s - journey.arrived_s
    e2e_s = now_s - journey.arrived_s
    tokens = len(journey.tokens)
    return RequestCompleted(
        request_id=journey.request_id,
        outcome=_outcome(journey),
        model_id=journey.model_id,
        tenant=journey.tenant,
        slo_class=journey.slo_class,
        replica_id=journey.replica_id,
        request_type=journey.request_type,
        input_tokens=len(journey.prompt_tokens),
        output_tokens=tokens,
        ttft_s=ttft_s,
        tpot_s=None if ttft_s is None else tpot_s(ttft_s=ttft_s, e2e_s=e2e_s, output_tokens=tokens),
        e2e_s=e2e_s,
        overhead_s=journey.overhead_s(now_s),
        attempts=journey.moves + 1,
        epoch=journey.epoch,
        finish=journey.finish,
    )


def _outcome(journey: Journey) -> Outcome:
    match journey.finish:
        case "stop" | "length":
            return "completed"
        case "abort":
            return "aborted"
        case _:
            return "failed" if journey.replica_id else "rejected"  # no replica was ever found

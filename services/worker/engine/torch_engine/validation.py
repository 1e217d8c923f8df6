"""Refuses requests that the engine cannot serve, before anything is queued."""

import math

from services.worker.engine.interface import EngineRequest
from shared.errors import Rejected
from shared.messages.requests import SamplingParams


def check_request(request: EngineRequest, *, vocabulary: int, context_tokens: int) -> None:
    """Raises Rejected with code ``invalid`` or ``too_long``."""
    sampling = request.sampling
    if not request.prompt_tokens:
        raise Rejected("invalid", "the prompt is empty: send at least one token")
    for tokens in (request.prompt_tokens, request.output_tokens):
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise Rejected("invalid", f"a token lies outside the vocabulary of {vocabulary}")
    problem = _sampling_problem(sampling, vocabulary=vocabulary)
    if problem:
        raise Rejected("invalid", problem)
    if len(request.output_tokens) > sampling.output_tokens_max:
        raise Rejected("invalid", "output_tokens holds more than output_tokens_max")
    asked = len(request.prompt_tokens) + sampling.output_tokens_max
    if asked > context_tokens:
        detail = f"prompt and output of {asked} tokens exceed the context of {context_tokens}"
        raise Rejected("too_long", detail)


def _sampling_problem(sampling: SamplingParams, *, vocabulary: int) -> str:
    if sampling.output_tokens_max < 1:
        return "output_tokens_max must be at least 1"
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        return "temperature must be 0 or a positive number"
    if not 0 < sampling.top_p <= 1:
        return "top_p must be above 0 and at most 1"
    if sampling.top_k < 0:
        return "top_k must be 0 (all tokens) or positive"
    if not all(sampling.stop):
        return "a stop string must not be empty"
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= vocabulary:
        return f"logprobs must be between 0 and the vocabulary's size {vocabulary}"
    return ""

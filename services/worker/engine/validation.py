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
    """What is wrong with the parameters; empty if nothing is."""
    rules = (
        (sampling.output_tokens_max >= 1, "output_tokens_max must be at least 1"),
        (0 <= sampling.temperature < math.inf, "temperature must be 0 or a positive number"),
        (0 < sampling.top_p <= 1, "top_p must be above 0 and at most 1"),
        (sampling.top_k >= 0, "top_k must be 0 (all tokens) or positive"),
        (all(sampling.stop), "a stop string must not be empty"),
        (
            sampling.logprobs is None or 0 <= sampling.logprobs <= vocabulary,
            f"logprobs must be between 0 and the vocabulary's size {vocabulary}",
        ),
    )
    return next((problem for sound, problem in rules if not sound), "")

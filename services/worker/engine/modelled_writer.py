"""What a modelled engine remembers of a request: all that its tokens depend on."""

from dataclasses import dataclass

from services.worker.engine.interface import EngineChunk, EngineRequest
from services.worker.engine.made_up import root_of
from services.worker.engine.stopping import StopCheck
from shared.text import Tokenizer


class Writer:
    """What a live request's tokens depend on."""

    __slots__ = ("ignore_eos", "logprobs", "position", "request", "root", "stop")

    def __init__(self, request: EngineRequest, stop: StopCheck | None) -> None:
        sampling = request.sampling
        self.request = request
        self.root = root_of(request.prompt_tokens, seed=sampling.seed)
        self.position = len(request.output_tokens)  # of its next token
        self.stop = stop  # only with stop strings: it costs per token
        self.ignore_eos = sampling.ignore_eos
        self.logprobs = sampling.logprobs


@dataclass(frozen=True, slots=True)
class Ended:
    """Ended by what it brought along; told in the next step."""

    request: EngineRequest
    chunk: EngineChunk


def begin(request: EngineRequest, tokenizer: Tokenizer) -> Writer | Ended:
    """Go on after the output that the request brings along, or find its end there."""
    sampling, made = request.sampling, request.output_tokens
    if not sampling.stop and not made:
        return Writer(request, None)
    stop = StopCheck(request, tokenizer)
    finish = stop.feed_earlier(made)
    if finish is not None:
        return Ended(request, EngineChunk(request.key, len(made), [], finish))
    return Writer(request, stop if sampling.stop else None)

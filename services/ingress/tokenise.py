"""Prompts to tokens, without holding up the event loop.

A short text is encoded at once: for it, a thread costs more than the work (a hop is about 100 us,
2 kB of text about 300 us). A long one goes to a small pool of threads, which the tokenizers
library lets run beside the event loop. How many may wait is bounded: beyond that, 503.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from services.ingress.openai_api import ParsedRequest, Prompt
from services.ingress.openai_errors import (
    context_length_exceeded,
    invalid_request,
    overloaded,
)
from shared.errors import Rejected
from shared.text import Tokenizer

INLINE_CHARS_MAX = 2048


class Tokenise:
    """A bounded pool in front of one or more tokenizers. Used from one event loop."""

    def __init__(self, *, num_threads: int = 2, waiting_max: int = 256) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenise")
        self._waiting = 0
        self._waiting_max = waiting_max

    async def prompts(self, request: ParsedRequest, tokenizer: Tokenizer) -> list[list[int]]:
        """The tokens of each prompt (one for a chat), none empty, all in the vocabulary. Raises
        ApiError: 400 for what cannot be a prompt, 503 when too many are waiting."""
        if _num_chars(request) <= INLINE_CHARS_MAX:
            return encode_prompts(request, tokenizer)
        if self._waiting >= self._waiting_max:
            raise overloaded("Too many long prompts are waiting to be tokenised: retry later.")
        self._waiting += 1
        loop = asyncio.get_running_loop()
        job = loop.run_in_executor(self._pool, encode_prompts, request, tokenizer)
        job.add_done_callback(self._ended)
        # Shielded, so that a client who goes away leaves the count as true as the queue is long:
        # the pool would keep a cancelled job queued, uncounted.
        return await asyncio.shield(job)

    def _ended(self, job: "asyncio.Future[list[list[int]]]") -> None:
        self._waiting -= 1
        if not job.cancelled():
            job.exception()  # Seen: its request may have gone.

    def close(self) -> None:
        """Wait for what runs; what waits is dropped."""
        self._pool.shutdown(cancel_futures=True)


def encode_prompts(request: ParsedRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """What ``Tokenise.prompts`` does, in the calling thread; raises ApiError."""
    if request.kind == "completion":
        return [
            _tokens(prompt, tokenizer, _param(request, index))
            for index, prompt in enumerate(request.prompts)
        ]
    try:
        text = tokenizer.render_chat(request.messages)
    except Rejected as error:
        raise invalid_request(error.detail, param="messages") from error
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        raise invalid_request(
            "messages: the prompt has no tokens; say something.", param="messages"
        )
    return [tokens]


def output_tokens_allowed(
    request: ParsedRequest, *, prompt_tokens: int, context_tokens_max: int
) -> int:
    """How many tokens the request may generate; raises ApiError 413 if prompt and output cannot
    both fit the context. A request that does not say gets what the prompt leaves."""
    wanted = request.output_tokens_max or 1
    if prompt_tokens + wanted > context_tokens_max:
        raise context_length_exceeded(
            f"This model's context is {context_tokens_max} tokens, but you asked for "
            f"{prompt_tokens + wanted} ({prompt_tokens} in the prompt, {wanted} to generate): "
            "send a shorter prompt or ask for fewer tokens.",
            param="prompt" if request.kind == "completion" else "messages",
        )
    return request.output_tokens_max or context_tokens_max - prompt_tokens


def _num_chars(request: ParsedRequest) -> int:
    """Characters to encode; token ids cost nothing."""
    prompts = sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str))
    return prompts + sum(len(message["content"]) for message in request.messages)


def _tokens(prompt: Prompt, tokenizer: Tokenizer, param: str) -> list[int]:
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt, add_special_tokens=True)
        if not tokens:
            raise invalid_request(f"{param}: the prompt has no tokens; say something.", param=param)
        return tokens
    highest = max(prompt)
    if highest >= tokenizer.vocab_size:
        message = (
            f"{param}: token id {highest} is outside the vocabulary of {tokenizer.vocab_size}: "
            "use the tokenizer of this model."
        )
        raise invalid_request(message, param=param)
    return prompt


def _param(request: ParsedRequest, index: int) -> str:
    return "prompt" if len(request.prompts) == 1 else f"prompt[{index}]"

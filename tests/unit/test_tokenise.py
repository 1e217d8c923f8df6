"""Prompts to tokens, short and long, good and bad."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.ingress.openai_api import ParsedRequest
from services.ingress.openai_errors import ApiError
from services.ingress.tokenise import (
    INLINE_CHARS_MAX,
    Tokenise,
    encode_prompts,
    output_tokens_allowed,
)
from shared.text import ChatTemplate, byte_tokenizer

SHORT = ParsedRequest(kind="completion", model="m", prompts=("hi", [104, 105]))
LONG = ParsedRequest(kind="completion", model="m", prompts=("x" * (INLINE_CHARS_MAX + 1),))
CHAT = ParsedRequest(kind="chat", model="m", messages=({"role": "user", "content": "hi"},))


class SlowCodec:
    """A byte tokenizer that waits for permission, and tells in which threads it ran."""

    vocab_size = 256

    def __init__(self) -> None:
        self.permission = threading.Event()
        self.threads: set[int] = set()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.threads.add(threading.get_ident())
        assert self.permission.wait(10)
        return list(text.encode())

    def decode(self, tokens: Sequence[int], *, skip_special: bool) -> str:
        return bytes(tokens).decode()


def test_prompts_of_each_form_become_tokens() -> None:
    """Text gets the model's first token, token ids are taken as they are, a chat is rendered."""
    tokenizer = byte_tokenizer()
    assert encode_prompts(SHORT, tokenizer) == [[256, 104, 105], [104, 105]]
    [tokens] = encode_prompts(CHAT, tokenizer)
    assert tokenizer.decode(tokens) == "user: hi\nassistant: "
    assert tokens[0] != tokenizer.bos_id


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (replace(SHORT, prompts=([258],)), "prompt"),
        (replace(SHORT, prompts=("a", [1, 999])), "prompt[1]"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(request_: ParsedRequest, param: str) -> None:
    """Such an id would read outside the model's embedding table."""
    with pytest.raises(ApiError, match="outside the vocabulary") as caught:
        encode_prompts(request_, byte_tokenizer())
    assert (caught.value.status, caught.value.param) == (400, param)


def test_prompts_without_tokens_are_refused() -> None:
    """A model cannot go on from nothing."""
    codec = SlowCodec()
    codec.permission.set()
    nothing = ChatTemplate("", {})
    tokenizer = replace(byte_tokenizer(), codec=codec, chat_template=nothing)
    for request, param in ((replace(SHORT, prompts=("",)), "prompt"), (CHAT, "messages")):
        with pytest.raises(ApiError, match="no tokens") as caught:
            encode_prompts(request, tokenizer)
        assert (caught.value.status, caught.value.param) == (400, param)


def test_what_the_template_refuses_is_400() -> None:
    """The client must learn that its messages do not fit this model."""
    template = ChatTemplate("{{ raise_exception('only one turn') }}", {})
    for tokenizer, said in (
        (replace(byte_tokenizer(), chat_template=template), "only one turn"),
        (replace(byte_tokenizer(), chat_template=None), "no chat template"),
    ):
        with pytest.raises(ApiError, match=said) as caught:
            encode_prompts(CHAT, tokenizer)
        assert (caught.value.status, caught.value.param) == (400, "messages")


def test_output_is_what_fits() -> None:
    """A request beyond the context would fail on the replica, after waiting for it."""
    limited = replace(CHAT, output_tokens_max=10)
    assert output_tokens_allowed(limited, prompt_tokens=90, context_tokens_max=100) == 10
    assert output_tokens_allowed(CHAT, prompt_tokens=90, context_tokens_max=100) == 10
    for request, prompt_tokens in ((limited, 91), (CHAT, 100)):
        with pytest.raises(ApiError) as caught:
            output_tokens_allowed(request, prompt_tokens=prompt_tokens, context_tokens_max=100)
        assert (caught.value.status, caught.value.code) == (413, "context_length_exceeded")


def test_long_texts_leave_the_loop_free_and_are_bounded() -> None:
    """One long document must not stall the streams of everyone else, nor may a thousand of them
    fill the memory; a client that goes away must not loosen that bound."""

    async def scenario() -> None:
        codec = SlowCodec()
        tokenizer = replace(byte_tokenizer(), codec=codec)
        tokenise = Tokenise(num_threads=1, waiting_max=2)
        async with asyncio.TaskGroup() as tasks:
            kept = tasks.create_task(tokenise.prompts(LONG, tokenizer))
            gone = tasks.create_task(tokenise.prompts(LONG, tokenizer))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.sleep(0)
            assert await tokenise.prompts(SHORT, byte_tokenizer())
            with pytest.raises(ApiError) as caught:
                await tokenise.prompts(LONG, tokenizer)
            assert caught.value.status == 503
            assert caught.value.headers()
            codec.permission.set()
            assert len((await kept)[0]) == INLINE_CHARS_MAX + 1
            assert threading.get_ident() not in codec.threads
        assert await tokenise.prompts(LONG, tokenizer)
        tokenise.close()

    asyncio.run(scenario())


def test_a_refusal_in_a_thread_reaches_the_client() -> None:
    """An error in the pool must be the same 400 as one in the loop."""

    async def scenario() -> None:
        tokenise = Tokenise()
        long_chat = replace(CHAT, messages=({"role": "user", "content": "x" * 5000},))
        with pytest.raises(ApiError) as caught:
            await tokenise.prompts(long_chat, replace(byte_tokenizer(), chat_template=None))
        assert caught.value.status == 400
        tokenise.close()

    asyncio.run(scenario())

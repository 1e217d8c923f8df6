"""The JSON bodies that we read, field by field, with OpenAI's names and types.

Every field of OpenAI's API is listed, served or not, so that one which is left at its neutral
value passes and any other value is refused by name; a field that is not listed is an error too.
What is not served is checked in openai_api.py.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

TOKENS_MAX = 2**31 - 1
_INT64 = Meta(ge=-(2**63), le=2**63 - 1)

Tokens = Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=TOKENS_MAX)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=TOKENS_MAX)]
Choices = Annotated[int, Meta(ge=1, le=16)]
Seed = Annotated[int, _INT64]
Label = Annotated[str, Meta(max_length=512)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class CommonFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take. ``None`` is "not given", as OpenAI's clients send it."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    user: Label | None = None
    # Ours, named as other engines name them.
    top_k: TopK | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    # Accepted: they ask nothing of us that would change the answer.
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    # Accepted at their neutral value only.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None


class CompletionRequest(CommonFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class ContentPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a message. Only text is served; the other kinds are listed to be refused by
    name."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


class MessageFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message. The fields after ``name`` come back when a client sends our own answers again,
    and are then empty."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: Label | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


class ChatCompletionRequest(CommonFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[MessageFields], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    # Accepted: without tools, and without a prompt cache to keep, they have no effect.
    parallel_tool_calls: bool | None = None
    prompt_cache_retention: Label | None = None
    # Accepted at their neutral value only.
    store: bool | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    prompt_cache_options: Any = None
    moderation: Any = None

"""Reads and checks the bodies of OpenAI's two endpoints.

Whatever the bytes are, the outcome is a ParsedRequest or an ApiError that names the field and
says what to do. Nothing is silently ignored: a field that we would not honour is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import msgspec

from services.ingress.openai_errors import ApiError, invalid_request
from services.ingress.openai_fields import (
    ChatCompletionRequest,
    CommonFields,
    CompletionRequest,
    ContentPart,
    MessageFields,
)

COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's default for /v1/completions
PROMPTS_MAX = 64
CHOICES_MAX = 128  # prompts times n
STOPS_MAX = 4
STOP_CHARS_MAX = 1024

Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A request whose every field is known to be in range. Either ``prompts`` or ``messages`` is
    empty. There are ``len(prompts) * n`` choices (``n`` for a chat), prompt by prompt."""

    kind: Literal["completion", "chat"]
    model: str
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    output_tokens_max: int | None = None  # None: as many as the context holds
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    user: str = ""
    ignore_eos: bool = False
    return_token_ids: bool = False

    @property
    def num_choices(self) -> int:
        return max(1, len(self.prompts)) * self.n


def parse_completion(body: bytes) -> ParsedRequest:
    """Body of POST /v1/completions; raises ApiError."""
    request = _decode(_COMPLETION, body)
    _check_neutral(request, _NEUTRAL_COMPLETION)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise _refuse("best_of", request.best_of, "leave it out or set it to the value of n")
    prompts = _prompts(request.prompt)
    if len(prompts) * (request.n or 1) > CHOICES_MAX:
        raise _refuse("n", request.n, f"prompts times n must not exceed {CHOICES_MAX}")
    return ParsedRequest(
        kind="completion",
        prompts=prompts,
        output_tokens_max=request.max_tokens or COMPLETION_TOKENS_DEFAULT,
        logprobs=request.logprobs,
        **_common(request),
    )


def parse_chat(body: bytes) -> ParsedRequest:
    """Body of POST /v1/chat/completions; raises ApiError."""
    request = _decode(_CHAT, body)
    _check_neutral(request, _NEUTRAL_CHAT)
    max_tokens = request.max_completion_tokens or request.max_tokens
    if request.max_tokens not in (None, max_tokens):
        raise _refuse("max_tokens", request.max_tokens, "give only max_completion_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise _refuse("top_logprobs", request.top_logprobs, "it needs logprobs = true")
    return ParsedRequest(
        kind="chat",
        messages=tuple(_message(i, fields) for i, fields in enumerate(request.messages)),
        output_tokens_max=max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        **_common(request),
    )


R = TypeVar("R", bound=CommonFields)

_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_CHAT = msgspec.json.Decoder(ChatCompletionRequest)
_PATH = re.compile(r" - at `\$\.?(.*)`$", re.DOTALL)
_FIELD = re.compile(r"(?:field|missing required field) `(.*)`", re.DOTALL)


def _decode(decoder: "msgspec.json.Decoder[R]", body: bytes) -> R:
    if not body:
        raise invalid_request("The request body is empty: send a JSON object.", code="invalid_json")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"The request body is not valid JSON: {error}."
        raise invalid_request(message, code="invalid_json") from error


def _invalid_field(text: str) -> ApiError:
    """From msgspec's text, which ends in the path of the field."""
    path = _PATH.search(text)
    param = path[1] if path else ""
    text = text[: path.start()] if path else text
    field = _FIELD.search(text)
    if field is not None:  # the path of an unknown or missing field is that of its object
        param = f"{param}.{field[1]}" if param else field[1]
        what = "is not known here: remove it" if "unknown" in text else "is required"
        code = "unknown_parameter" if "unknown" in text else "missing_required_parameter"
        return invalid_request(f"{param[:200]} {what}.", param=param[:200], code=code)
    if not param:
        return invalid_request(f"The request body is invalid: {text}.")
    return invalid_request(f"{param}: {text[:1].lower()}{text[1:]}.", param=param)


def _refuse(param: str, value: object, remedy: str) -> ApiError:
    shown = msgspec.json.encode(value)[:100].decode(errors="replace")
    return invalid_request(f"{param} = {shown}: {remedy}.", param=param)


_Neutral = Mapping[str, tuple[tuple[object, ...], str]]

_NEUTRAL_COMMON: _Neutral = {
    "presence_penalty": ((0,), "penalties are not served; leave it out or set it to 0"),
    "frequency_penalty": ((0,), "penalties are not served; leave it out or set it to 0"),
    "repetition_penalty": ((1,), "penalties are not served; leave it out or set it to 1"),
    "min_p": ((0,), "it is not served; leave it out or set it to 0"),
    "min_tokens": ((0,), "it is not served; leave it out or set it to 0"),
    "logit_bias": (({},), "it is not served; leave it out or set it to {}"),
}
_NEUTRAL_COMPLETION: _Neutral = {
    **_NEUTRAL_COMMON,
    "echo": ((False,), "it is not served; leave it out or set it to false"),
    "suffix": (("",), "infilling is not served; leave it out"),
}
_NEUTRAL_CHAT: _Neutral = {
    **_NEUTRAL_COMMON,
    "store": ((False,), "answers are not stored; leave it out or set it to false"),
    "response_format": (({"type": "text"},), 'only {"type": "text"} is served'),
    "tools": (([],), "tools are not served; leave it out"),
    "tool_choice": (("none", "auto"), "tools are not served; leave it out"),
    "functions": (([],), "functions are not served; leave it out"),
    "function_call": (("none", "auto"), "functions are not served; leave it out"),
    "modalities": ((["text"],), 'only ["text"] is served'),
    "audio": ((), "only text is served; leave it out"),
    "prediction": ((), "it is not served; leave it out"),
    "reasoning_effort": (("none",), "it is not served; leave it out"),
    "verbosity": (("medium",), "it is not served; leave it out"),
    "web_search_options": ((), "it is not served; leave it out"),
    "prompt_cache_options": ((), "it is not served; leave it out"),
    "moderation": ((), "it is not served; leave it out"),
}


def _check_neutral(request: CommonFields, neutral: _Neutral) -> None:
    for name, (allowed, remedy) in neutral.items():
        value = getattr(request, name)
        if value is not None and value not in allowed:
            raise _refuse(name, value, remedy)


def _common(request: CommonFields) -> dict[str, Any]:
    """The fields of ParsedRequest that both endpoints fill alike."""
    options = request.stream_options
    if options is not None and not request.stream:
        raise invalid_request(
            "stream_options is only allowed with stream = true: leave it out.",
            param="stream_options",
        )
    return {
        "model": request.model,
        "stream": bool(request.stream),
        "include_usage": bool(options is not None and options.include_usage),
        "n": request.n or 1,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": request.top_p or 1.0,
        "top_k": max(0, request.top_k or 0),  # -1 says "all tokens" elsewhere
        "seed": request.seed,
        "stop": _stop(request.stop),
        "user": request.user or "",
        "ignore_eos": bool(request.ignore_eos),
        "return_token_ids": bool(request.return_token_ids),
    }


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    given = [stop] if isinstance(stop, str) else stop
    if len(given) > STOPS_MAX:
        raise _refuse("stop", len(given), f"give at most {STOPS_MAX} stop strings")
    for index, text in enumerate(given):
        if not 1 <= len(text) <= STOP_CHARS_MAX:
            param = "stop" if isinstance(stop, str) else f"stop[{index}]"
            raise _refuse(param, text, f"must have 1 to {STOP_CHARS_MAX} characters")
    return tuple(dict.fromkeys(given))


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[Prompt, ...]:
    """One text, one list of token ids, or a list of either."""
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise _refuse("prompt", prompt, "give a text or token ids")
    if isinstance(prompt[0], int):
        _check_alike(prompt, int, "token ids")
        return (cast("list[int]", prompt),)
    if len(prompt) > PROMPTS_MAX:
        raise invalid_request(
            f"prompt: {len(prompt)} prompts in one request; send at most {PROMPTS_MAX}.",
            param="prompt",
        )
    if isinstance(prompt[0], str):
        _check_alike(prompt, str, "texts")
    else:
        _check_alike(prompt, list, "lists of token ids")
        for index, tokens in enumerate(prompt):
            if not tokens:
                raise _refuse(f"prompt[{index}]", tokens, "give at least one token id")
    return tuple(cast("list[Prompt]", prompt))


def _check_alike(prompt: list[Any], kind: type, noun: str) -> None:
    if set(map(type, prompt)) == {kind}:  # at C speed: a prompt may be 100,000 ids
        return
    index = next(i for i, item in enumerate(prompt) if type(item) is not kind)
    raise _refuse(f"prompt[{index}]", prompt[index], f"the list must hold only {noun}")


def _message(index: int, fields: MessageFields) -> dict[str, str]:
    """What the chat template gets. ``developer`` is OpenAI's newer name for ``system``, which no
    template of an open model knows."""
    param = f"messages[{index}]"
    if fields.role in ("tool", "function"):
        raise _refuse(f"{param}.role", fields.role, "tools are not served; remove the message")
    for name in ("refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id"):
        value = getattr(fields, name)
        if value is not None and value != []:
            raise _refuse(f"{param}.{name}", value, "it is not served; leave it out")
    content = fields.content
    if content is None:
        raise invalid_request(
            f"{param}.content is required: give a text.", param=f"{param}.content"
        )
    if not isinstance(content, str):
        content = _joined(f"{param}.content", content)
    role = "system" if fields.role == "developer" else fields.role
    message = {"role": role, "content": content}
    if fields.name is not None:
        message["name"] = fields.name
    return message


def _joined(param: str, parts: list[ContentPart]) -> str:
    """The text parts, one per line, as other engines join them."""
    texts: list[str] = []
    for index, part in enumerate(parts):
        if part.type != "text":
            raise _refuse(f"{param}[{index}].type", part.type, "only text parts are served")
        if part.text is None:
            where = f"{param}[{index}].text"
            raise invalid_request(f"{where} is required.", param=where)
        texts.append(part.text)
    return "\n".join(texts)

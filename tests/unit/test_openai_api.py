"""Reading OpenAI's bodies: what is served is understood, what is not is refused by name."""

import json
from typing import Any

import msgspec
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from services.ingress.openai_api import ParsedRequest, parse_chat, parse_completion
from services.ingress.openai_errors import ApiError
from services.ingress.openai_fields import ChatCompletionRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: object) -> ParsedRequest:
    return parse_chat(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode())


def completion(**fields: object) -> ParsedRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi"} | fields).encode())


ENDPOINTS = {"chat": chat, "completion": completion}


def _refusal(kind: str, **fields: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ENDPOINTS[kind](**fields)
    error = caught.value
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert error.param is None or error.param in error.message
    return error


def test_defaults_are_those_of_openai() -> None:
    """A request that says nothing must be sampled as OpenAI's users expect."""
    assert chat() == ParsedRequest(kind="chat", model="m", messages=tuple(MESSAGES))
    assert completion() == ParsedRequest(
        kind="completion", model="m", prompts=("hi",), output_tokens_max=16
    )


def test_every_served_field_is_understood() -> None:
    """A field read wrongly changes answers without an error."""
    common: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 3,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "seed": -5,
        "stop": ["a", "b", "a"],
        "user": "u",
        "ignore_eos": True,
        "return_token_ids": True,
    }
    expected: dict[str, Any] = common | {
        "model": "m",
        "include_usage": True,
        "temperature": 0.0,
        "stop": ("a", "b"),
    }
    del expected["stream_options"]
    assert chat(max_tokens=9, logprobs=True, top_logprobs=4, **common) == ParsedRequest(
        kind="chat", messages=tuple(MESSAGES), output_tokens_max=9, logprobs=4, **expected
    )
    parsed = completion(prompt=["x", "y"], max_tokens=9, logprobs=0, best_of=3, **common)
    assert parsed == ParsedRequest(
        kind="completion", prompts=("x", "y"), output_tokens_max=9, logprobs=0, **expected
    )
    assert parsed.num_choices == 6
    assert chat(stop="x").stop == ("x",)
    assert chat(top_k=-1).top_k == 0
    assert chat(logprobs=True).logprobs == 0
    assert chat(max_completion_tokens=5, max_tokens=5).output_tokens_max == 5


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        ("", ("",)),
        ([1, 2], ([1, 2],)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ([1], [2, 3])),
    ],
)
def test_all_four_forms_of_prompt(prompt: object, prompts: object) -> None:
    """Evaluation tools send token ids and batches."""
    assert completion(prompt=prompt).prompts == prompts


def test_messages_are_made_plain_for_the_template() -> None:
    """Templates read strings; parts and the newer role must not reach them as they are."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[Any] = [
        {"role": "developer", "content": "d", "name": "x"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "audio": None},
    ]
    assert chat(messages=messages).messages == (
        {"role": "system", "content": "d", "name": "x"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": ""},
    )


NEUTRAL: dict[str, list[object]] = {
    "presence_penalty": [0, 0.0, None],
    "frequency_penalty": [0],
    "repetition_penalty": [1, 1.0],
    "min_p": [0],
    "min_tokens": [0],
    "logit_bias": [{}, None],
    "metadata": [{"a": "b"}],
    "service_tier": ["auto", "default"],
    "safety_identifier": ["x"],
    "prompt_cache_key": ["x"],
}
NEUTRAL_CHAT: dict[str, list[object]] = {
    **NEUTRAL,
    "store": [False],
    "response_format": [{"type": "text"}],
    "tools": [[], None],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "function_call": ["none"],
    "modalities": [["text"]],
    "verbosity": ["medium"],
    "prompt_cache_retention": ["24h"],
    "reasoning_effort": ["none"],
}
NEUTRAL_COMPLETION: dict[str, list[object]] = {
    **NEUTRAL,
    "echo": [False],
    "suffix": [None, ""],
    "best_of": [1],
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("chat", field, value) for field, values in NEUTRAL_CHAT.items() for value in values]
    + [("completion", f, value) for f, values in NEUTRAL_COMPLETION.items() for value in values],
)
def test_neutral_values_pass(kind: str, field: str, value: object) -> None:
    """Clients and frameworks send such defaults without being asked; refusing them would shut
    those clients out."""
    assert ENDPOINTS[kind](**{field: value}) == ENDPOINTS[kind]()


REFUSED: dict[str, list[object]] = {
    "model": ["", 5, None],
    "n": [0, 17, 1.5, "1", True],
    "max_tokens": [0, -1, 2**31, 10**40, 1.5, "1"],
    "temperature": [-0.1, 2.1, "1", True, 10**400],
    "top_p": [0, 1.1, "1", -1],
    "top_k": [-2, 0.5],
    "seed": [2**63, "x", 1.5],
    "stop": [5, "", ["a"] * 5, {}, "x" * 1025],
    "stream": [1, "true"],
    "user": [5, "x" * 513],
    "ignore_eos": ["x", 1],
    "return_token_ids": [1],
    "metadata": [5],
    "service_tier": ["flex", 1],
    "presence_penalty": [0.5, "0", False],
    "frequency_penalty": [-1],
    "repetition_penalty": [1.1],
    "min_p": [0.1],
    "min_tokens": [3],
    "logit_bias": [{"5": 1}, 5],
    "stream_options": [{"include_usage": True}, 5],
    "guided_json": [{}],
}
REFUSED_CHAT: dict[str, list[object]] = {
    **REFUSED,
    "messages": [[], None, 5, "hi"],
    "max_completion_tokens": [0, "5"],
    "logprobs": [1, "x"],
    "top_logprobs": [21, -1, 1],
    "store": [True, 1],
    "response_format": [{"type": "json_object"}, 5],
    "tools": [[{"type": "function"}], 5],
    "tool_choice": ["required", {"type": "function"}],
    "functions": [[{}]],
    "function_call": [{"name": "f"}],
    "modalities": [["audio"]],
    "audio": [{}, 1],
    "prediction": [{"type": "content"}],
    "reasoning_effort": ["high"],
    "verbosity": ["low"],
    "web_search_options": [{}],
    "prompt_cache_options": [{}],
    "moderation": [{}],
    "prompt": ["hi"],
}
REFUSED_COMPLETION: dict[str, list[object]] = {
    **REFUSED,
    "prompt": [[], None, 5, [[]] * 2 + [[1]], ["a"] * 65, {}],
    "logprobs": [True, 6, -1],
    "echo": [True, 1],
    "suffix": ["x", 5],
    "best_of": [2, "1"],
    "messages": [MESSAGES],
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("chat", field, value) for field, values in REFUSED_CHAT.items() for value in values]
    + [("completion", f, value) for f, values in REFUSED_COMPLETION.items() for value in values],
)
def test_bad_values_are_refused_by_name(kind: str, field: str, value: object) -> None:
    """A user must learn which field to change; an ignored one would give silently other
    answers."""
    error = _refusal(kind, **{field: value})
    assert error.param is not None
    assert error.param.split("[")[0].split(".")[0] == field


BAD_MESSAGES: list[tuple[list[Any], str]] = [
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"content": "x"}], "messages[0].role"),
    ([*MESSAGES, {"role": "robot", "content": "x"}], "messages[1].role"),
    ([*MESSAGES, {"role": "tool", "content": "x"}], "messages[1].role"),
    ([*MESSAGES, "x"], "messages[1]"),
    ([{"role": "user", "content": "x", "mood": 1}], "messages[0].mood"),
    ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}],
        "messages[0].content[0].type",
    ),
]


@pytest.mark.parametrize(("messages", "param"), BAD_MESSAGES)
def test_bad_messages_are_refused_by_path(messages: object, param: str) -> None:
    """In a chat of fifty messages, the user must learn which one is wrong."""
    assert _refusal("chat", messages=messages).param == param


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        ([[1], "a"], "prompt[1]"),
        ([[1], []], "prompt[1]"),
        ([-1], "prompt[0]"),
        ([[1.5]], "prompt[0][0]"),
        (["a"] * 64, "n"),
    ],
)
def test_bad_prompts_are_refused_by_path(prompt: object, param: str) -> None:
    """A batch with one bad item must say which."""
    error = _refusal("completion", prompt=prompt, n=16)
    assert error.param in (param, "prompt[...]")  # msgspec does not count inside a union


def test_unlike_limits_are_refused() -> None:
    """Two limits that differ: whichever we took, one would be ignored."""
    assert _refusal("chat", max_tokens=5, max_completion_tokens=6).param == "max_tokens"


def test_unknown_options_are_refused_by_path() -> None:
    """A misspelt option must not be ignored."""
    error = _refusal("chat", stream=True, stream_options={"include_usages": True})
    assert (error.param, error.code) == ("stream_options.include_usages", "unknown_parameter")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"model": "m", "prompt": "a', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"model": "\xff"}', "not valid JSON"),
        (b'{"model": "m", "prompt": "\\ud800"}', "not valid JSON"),
        (b'{"model": "m", "prompt": "a", "top_p": NaN}', "not valid JSON"),
        (b'{"model": "m", "prompt": "a", "top_p": 1e999}', "top_p"),
        (b"[]", "object"),
        (b'"x"', "object"),
        (b'{"model": "m", "logit_bias": {"5": ' + b"[" * 100_000, "logit_bias"),
        (b'{"model": ' + b"[" * 100_000, "model"),
        (b'{"model": "m", "prompt": "a"} x', "not valid JSON"),
    ],
)
def test_what_is_not_a_json_object_is_refused(body: bytes, said: str) -> None:
    """Broken proxies and clients send such bodies; a 500 would blame us."""
    for parse in (parse_completion, parse_chat):
        with pytest.raises(ApiError) as caught:
            parse(body)
        assert caught.value.status == 400
        if b"prompt" not in body or parse is parse_completion:
            assert said in caught.value.message


def test_endless_nesting_is_refused() -> None:
    """A few kilobytes of brackets must not break the process out of its stack."""
    with pytest.raises(ApiError, match="recursion"):
        parse_chat(b'{"model": "m", "audio": ' + b"[" * 100_000)


@pytest.mark.parametrize(
    ("struct", "params"),
    [(ChatCompletionRequest, ChatParams), (CompletionRequest, CompletionParams)],
)
def test_every_field_of_openais_client_is_listed(struct: type, params: type) -> None:
    """A field that the official client can send but that we do not know would be called unknown,
    even at its neutral value. When this fails after an update of openai, list the new field."""
    ours = {field.name for field in msgspec.structs.fields(struct)}
    theirs = {name for base in params.__mro__ for name in getattr(base, "__annotations__", {})}
    assert theirs
    assert not theirs - ours

"""Tokenizers, chat templates and stop strings, on made checkpoints of each family."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from shared.errors import ConfigInvalid, Rejected
from shared.text import StopMatcher, byte_tokenizer, load_tokenizer
from shared.text.detokenizer import TableDetokenizer, WindowDetokenizer
from tests.checkpoints import (
    FAMILIES,
    LLAMA3_TEMPLATE,
    byte_level,
    metaspace,
    with_bos,
    write_folder,
)
from tests.texts import CORPUS

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "naïve? <b>&'\"</b>\n"},
]

TEMPLATES = {
    "llama3": LLAMA3_TEMPLATE,
    "chatml": (
        "{%- for m in messages %}\n    {{- '<|start|>' + m.role + '\\n' + m.content }}\n"
        "{%- endfor %}\n{% if add_generation_prompt %}\n    <|start|>assistant\n{% endif %}\n"
    ),
    "json and loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
    "tools": (
        "{% if tools is not none %}no{% endif %}{% if documents %}no{% endif %}"
        "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ pad_token }}"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_and_decodes_as_transformers_do(
    tmp_path: Path, family: str, add_special_tokens: bool
) -> None:
    """Otherwise the model reads other tokens than the ones it was trained on."""
    path = write_folder(tmp_path, FAMILIES[family]())
    ours, theirs = load_tokenizer(path), _transformers(path)
    for text in [*CORPUS, "", " ", "<|start|>user<|end|> x"]:
        tokens = ours.encode(text, add_special_tokens=add_special_tokens)
        assert tokens == theirs.encode(text, add_special_tokens=add_special_tokens)
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
        assert ours.decode(tokens, skip_special=False) == theirs.decode(tokens)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("byte_level", TableDetokenizer),
        ("sentencepiece", TableDetokenizer),
        ("metaspace", WindowDetokenizer),
    ],
)
def test_common_families_are_tabulated(tmp_path: Path, family: str, kind: type) -> None:
    """Otherwise each token of each stream pays for a decoder run: a hundred times the cost."""
    tokenizer = load_tokenizer(write_folder(tmp_path, FAMILIES[family]()))
    assert type(tokenizer.detokenizer()) is kind


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, name: str) -> None:
    """Otherwise a chat model gets a prompt of another form than it was trained on, and answers
    worse without anyone noticing."""
    path = write_folder(tmp_path, byte_level(), chat_template=TEMPLATES[name])
    theirs = _transformers(path)
    for prompt in (True, False):
        ours = load_tokenizer(path).render_chat(MESSAGES, add_generation_prompt=prompt)
        assert ours == theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=prompt
        )


def test_template_file_wins_and_named_templates_are_found(tmp_path: Path) -> None:
    """Checkpoints keep their template in three places; the wrong one means wrong prompts."""
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    path = write_folder(tmp_path, byte_level(), chat_template=named)
    assert load_tokenizer(path).render_chat(MESSAGES) == "d"
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load_tokenizer(path).render_chat(MESSAGES) == "file"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[9].content.x }}", "has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_is_the_clients_error(
    tmp_path: Path, template: str, said: str
) -> None:
    """A client must learn that its messages do not fit; a checkpoint must not run code here."""
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level(), chat_template=template))
    with pytest.raises(Rejected, match=said) as caught:
        tokenizer.render_chat(MESSAGES)
    assert caught.value.code == "invalid"


def test_strftime_now_gives_a_date(tmp_path: Path) -> None:
    """Llama 3.1's template states the date; without the function every chat would fail."""
    template = "{{ strftime_now('%Y') }}"
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level(), chat_template=template))
    assert len(tokenizer.render_chat(MESSAGES)) == 4


def test_no_template_is_the_clients_error(tmp_path: Path) -> None:
    """A base model cannot chat: the client must be told to use completions."""
    tokenizer = load_tokenizer(write_folder(tmp_path, metaspace()))
    with pytest.raises(Rejected, match="/v1/completions"):
        tokenizer.render_chat(MESSAGES)


def test_every_end_token_is_known(tmp_path: Path) -> None:
    """A missing end token means answers that run on until the length limit."""
    path = write_folder(tmp_path, byte_level())
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}', encoding="utf-8")
    assert load_tokenizer(path).eos_ids == {1, 3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}', encoding="utf-8")
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_ids == {1, 2, 4}
    assert tokenizer.bos_id == 0


@pytest.mark.parametrize("add_bos", [True, False])
def test_add_bos_token_wins(tmp_path: Path, add_bos: bool) -> None:
    """Without its first token, or with two of them, a model's answers degrade silently."""
    for made, name in ((byte_level(), "without"), (with_bos(byte_level()), "with")):
        path = write_folder(tmp_path / name, made, add_bos_token=add_bos)
        tokenizer = load_tokenizer(path)
        has_bos = [token == 0 for token in tokenizer.encode("the fox")]
        assert has_bos == [add_bos] + [False] * (len(has_bos) - 1), name
        assert 0 not in tokenizer.encode("the fox", add_special_tokens=False)


def test_truncation_in_the_file_is_ignored(tmp_path: Path) -> None:
    """Some files carry the settings of a training run; prompts must not be cut by them."""
    made = byte_level()
    path = write_folder(tmp_path, made)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|bos|>",
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json cannot be read"),
        ("tokenizer.json", None, "holds no tokenizer.json"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "must be a Jinja template"),
        ("chat_template.jinja", "{% if %}", "not a Jinja template"),
        ("generation_config.json", "nope", "cannot be read"),
    ],
)
def test_a_bad_folder_says_what_is_wrong(
    tmp_path: Path, name: str, content: str | bytes | None, said: str
) -> None:
    """An operator must see which file to repair, not a traceback of a library."""
    path = write_folder(tmp_path, byte_level())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigInvalid, match=said):
        load_tokenizer(path)


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    """The usual typing error in a topology."""
    with pytest.raises(ConfigInvalid, match="existing checkpoint folder"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_tokens_are_named_for_logprobs(tmp_path: Path) -> None:
    """Clients match these names and bytes against the text."""
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level()))
    tokens = tokenizer.encode(" über🙂", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in tokens).decode() == " über🙂"
    assert tokenizer.token_text(1) == "<|eos|>"
    assert tokenizer.token_bytes(1) == b"<|eos|>"
    first_byte_of_emoji = tokenizer.encode("🙂", add_special_tokens=False)[0]
    assert tokenizer.token_text(first_byte_of_emoji).startswith("�")


def test_byte_tokenizer_is_bytes() -> None:
    """Models without a checkpoint must still take and give any text."""
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("hé", add_special_tokens=True)
    assert tokens == [tokenizer.bos_id, 104, 0xC3, 0xA9]
    assert tokenizer.decode(tokens) == "hé"
    assert tokenizer.decode(tokens, skip_special=False) == "<|bos|>hé"
    assert tokenizer.vocab_size == 258
    assert tokenizer.token_text(257) == "<|eos|>"
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "user: hi\nassistant: "


def test_continued_text_keeps_its_blank(tmp_path: Path) -> None:
    """A completion of "the" by " dog" must not read "thedog"."""
    tokenizer = load_tokenizer(write_folder(tmp_path, FAMILIES["sentencepiece"]()))
    prompt, more = tokenizer.encode("a"), tokenizer.encode("the")
    assert tokenizer.detokenizer().feed(more) == "the"
    assert tokenizer.detokenizer(after=prompt).feed(more) == " the"


def test_padding_ids_have_no_text() -> None:
    """Models pad their vocabulary; an id beyond the tokenizer's must not break a stream."""
    detokenizer = byte_tokenizer().detokenizer()
    assert detokenizer.feed([104, 9999, 105]) == "hi"
    assert detokenizer.feed([9999]) == ""


def test_stop_is_trimmed_and_nothing_follows() -> None:
    """A client must see neither the stop string nor what the model said after it."""
    matcher = StopMatcher(("\n\n", "END"))
    assert [matcher.feed(text) for text in ("a\n", "b E", "N", "D more")] == [
        ("a", False),
        ("\nb ", False),
        ("", False),
        ("", True),
    ]
    assert matcher.feed("later") == ("", True)
    assert matcher.flush() == ""


def test_text_held_for_a_stop_that_never_comes_is_not_lost() -> None:
    """The end of an answer that looks like the start of a stop string is still answer."""
    matcher = StopMatcher(("END",))
    assert matcher.feed("the EN") == ("the ", False)
    assert matcher.flush() == "EN"


def test_config_files_may_be_absent(tmp_path: Path) -> None:
    """tokenizer.json alone is enough for completions."""
    path = write_folder(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("the")) == "the"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, frozenset())


def _transformers(path: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

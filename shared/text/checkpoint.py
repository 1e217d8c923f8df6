"""Reads the tokenizer files of a checkpoint folder, as Hugging Face writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shared.errors import ConfigInvalid
from shared.text.chat import ChatTemplate
from shared.text.table import table_for
from shared.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in folder ``path``; raises ConfigInvalid naming what is wrong with it."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigInvalid(field="path", value=path, remedy="give an existing checkpoint folder")
    raw, text = _read_tokenizer(folder)
    config = _read_object(folder / "tokenizer_config.json")
    names = _token_names(config)
    vocab = raw.get_vocab(with_added_tokens=True)
    special_tokens = {
        id_: token.content for id_, token in raw.get_added_tokens_decoder().items() if token.special
    }
    codec = _HuggingFaceCodec(raw, vocab)
    bos_id = vocab.get(names.get("bos_token", ""))
    add_bos = config.get("add_bos_token")
    if isinstance(add_bos, bool) and bos_id is not None:
        codec.set_bos(bos_id, wanted=add_bos)
    return Tokenizer(
        codec=codec,
        table=table_for(json.loads(text).get("decoder"), vocab, special_tokens),
        chat_template=_chat_template(folder, config, names),
        special_tokens=special_tokens,
        bos_id=bos_id,
        eos_ids=_eos_ids(folder, vocab.get(names.get("eos_token", ""))),
    )


class _HuggingFaceCodec:
    def __init__(self, raw: "tokenizers.Tokenizer", vocab: dict[str, int]) -> None:
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self._raw = raw
        self._prefix: list[int] = []
        self._drop: int | None = None

    def set_bos(self, bos_id: int, *, wanted: bool) -> None:
        """``add_bos_token`` of tokenizer_config.json wins over tokenizer.json, as in
        transformers."""
        has_bos = self.encode("a", add_special_tokens=True)[:1] == [bos_id]
        self._prefix = [bos_id] if wanted and not has_bos else []
        self._drop = bos_id if has_bos and not wanted else None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # The batch call releases the interpreter lock and skips offsets; encode() does neither.
        encoding = self._raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        tokens = encoding.ids
        if not add_special_tokens:
            return tokens
        if self._drop is not None and tokens[:1] == [self._drop]:
            return tokens[1:]
        return self._prefix + tokens

    def decode(self, tokens: Sequence[int], *, skip_special: bool) -> str:
        return self._raw.decode(tokens, skip_special_tokens=skip_special)


def _read_tokenizer(folder: Path) -> tuple["tokenizers.Tokenizer", str]:
    """The tokenizer and the text of its file."""
    from tokenizers import Tokenizer as RawTokenizer  # noqa: PLC0415  # heavy, and not all need it

    file = folder / "tokenizer.json"
    try:
        text = file.read_text(encoding="utf-8")
        raw = RawTokenizer.from_str(text)
    except FileNotFoundError as error:
        remedy = "the folder holds no tokenizer.json: convert the checkpoint's tokenizer to it"
        raise ConfigInvalid(field="path", value=str(folder), remedy=remedy) from error
    except Exception as error:
        # The library raises plain Exception for a file that it cannot parse.
        if type(error) is not Exception and not isinstance(error, OSError | ValueError):
            raise
        remedy = f"tokenizer.json cannot be read ({error}): copy the checkpoint again"
        raise ConfigInvalid(field="path", value=str(folder), remedy=remedy) from error
    raw.no_truncation()
    raw.no_padding()
    return raw, text


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; empty if there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        remedy = f"cannot be read ({error}): copy the checkpoint again"
        raise ConfigInvalid(field=file.name, value=str(file), remedy=remedy) from error
    if not isinstance(value, dict):
        raise ConfigInvalid(field=file.name, value=str(file), remedy="must hold a JSON object")
    return cast("dict[str, Any]", value)


def _token_names(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens: each is written as its text, or as an object with ``content``."""
    names: dict[str, str] = {}
    for name in _TOKEN_NAMES:
        value: object = config.get(name)
        if isinstance(value, dict):
            value = cast("dict[str, Any]", value).get("content")
        if isinstance(value, str):
            names[name] = value
    return names


def _chat_template(
    folder: Path, config: dict[str, Any], names: dict[str, str]
) -> ChatTemplate | None:
    """chat_template.jinja wins over tokenizer_config.json, whose value may be a list of named
    templates."""
    file = folder / "chat_template.jinja"
    source = config.get("chat_template")
    if file.exists():
        source = file.read_text(encoding="utf-8")
    elif isinstance(source, list):
        entries = cast("list[dict[str, Any]]", source)
        source = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    if source is None:
        return None
    if not isinstance(source, str):
        raise ConfigInvalid(field="chat_template", value=source, remedy="must be a Jinja template")
    return ChatTemplate(source, names)


def _eos_ids(folder: Path, eos_id: int | None) -> frozenset[int]:
    """generation_config.json knows best (chat models end turns with more than one token)."""
    value: object = None
    for name in ("generation_config.json", "config.json"):
        value = _read_object(folder / name).get("eos_token_id")
        if value is not None:
            break
    listed = cast("list[object]", value) if isinstance(value, list) else [value]
    ids = {id_ for id_ in listed if isinstance(id_, int)}
    return frozenset(ids | ({eos_id} if eos_id is not None else set()))

"""Token id to bytes, known in advance: what makes detokenising a dictionary lookup.

Two families of tokenizers decode each token on its own and can be tabulated: byte-level BPE
(GPT-2, Llama 3, Qwen), where each character of a token stands for one byte, and sentencepiece
with byte fallback (Llama 2, Mistral, Gemma), where ``▁`` stands for a blank and ``<0x0A>`` for a
byte. Any other decoder has no table, and is asked each time.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


@dataclass(frozen=True, slots=True)
class TokenTable:
    """``texts`` holds only the tokens that are whole characters by themselves: most of them, and
    the fast path. Special tokens are empty in both: they never reach a client's text."""

    data: dict[int, bytes]
    texts: dict[int, str]
    blanks_stripped: int = 0  # at the start of a text that follows nothing

    @classmethod
    def of(
        cls, data: Mapping[int, bytes], *, special_ids: Iterable[int], blanks_stripped: int = 0
    ) -> "TokenTable":
        shown = {**data, **dict.fromkeys(special_ids, b"")}
        return cls(shown, _whole_texts(shown), blanks_stripped)


def table_for(
    decoder: object, vocab: Mapping[str, int], special_ids: Iterable[int]
) -> TokenTable | None:
    """The table of a tokenizer whose tokenizer.json names ``decoder``, or None if it cannot be
    tabulated."""
    if not isinstance(decoder, dict):
        return None
    steps = _steps(cast("dict[str, Any]", decoder))
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return _table(vocab, _byte_level_bytes, special_ids, 0)
    blanks_stripped = _sentencepiece_strip(steps)
    if blanks_stripped is None:
        return None
    return _table(vocab, _sentencepiece_bytes, special_ids, blanks_stripped)


def byte_level_alphabet() -> dict[str, int]:
    """Which printable character stands for which byte in byte-level BPE: Latin-1's printable
    ones for themselves, the rest for code points from 256 up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_ALPHABET = byte_level_alphabet()


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        return decoder.get("decoders", [])
    return [decoder]


def _sentencepiece_strip(steps: list[dict[str, Any]]) -> int | None:
    """Blanks stripped at the start by a sentencepiece decoder; None if it is not one."""
    if [step.get("type") for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return None
    if steps[0].get("pattern") != {"String": "▁"} or steps[0].get("content") != " ":
        return None
    match steps[3:]:
        case []:
            return 0
        case [{"type": "Strip", "content": " ", "start": int(start), "stop": 0}]:
            return start
        case _:
            return None


def _byte_level_bytes(token: str) -> bytes:
    """A token with any character outside the alphabet was added by hand, and means itself."""
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    match = _BYTE_TOKEN.match(token)
    return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()


def _table(
    vocab: Mapping[str, int],
    to_bytes: Callable[[str], bytes],
    special_ids: Iterable[int],
    blanks_stripped: int,
) -> TokenTable:
    data = {id_: to_bytes(token) for token, id_ in vocab.items()}
    return TokenTable.of(data, special_ids=special_ids, blanks_stripped=blanks_stripped)


def _whole_texts(data: Mapping[int, bytes]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for id_, token in data.items():
        try:
            texts[id_] = token.decode()
        except UnicodeDecodeError:
            continue
    return texts

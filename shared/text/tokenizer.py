"""A model's tokenizer, with what belongs to it: special tokens, end tokens, chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.errors import Rejected
from shared.text.chat import BUILT_IN_TEMPLATE, ChatMessage, ChatTemplate
from shared.text.detokenizer import IncrementalDetokenizer, TableDetokenizer, WindowDetokenizer
from shared.text.table import TokenTable


class Codec(Protocol):
    """Whole texts to tokens and back; the part that differs between tokenizers."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, tokens: Sequence[int], *, skip_special: bool) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Safe to use from several threads at once."""

    codec: Codec
    table: TokenTable | None = None
    chat_template: ChatTemplate | None = None
    special_tokens: dict[int, str]
    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that has a text; a model's own vocabulary may be padded
        beyond it."""
        return self.codec.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """``add_special_tokens`` for plain prompts, not for rendered chats: a template writes its
        own."""
        return self.codec.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        return self.codec.decode(tokens, skip_special=skip_special)

    def token_text(self, token: int) -> str:
        """How logprobs name a token: special ones by name, part of a character as U+FFFD."""
        special = self.special_tokens.get(token)
        if special is not None:
            return special
        if self.table is not None:
            return self.table.data.get(token, b"").decode(errors="replace")
        return self.codec.decode([token], skip_special=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that the token adds; where the tokenizer does not tell, those of its text."""
        if self.table is not None and token not in self.special_tokens:
            return self.table.data.get(token, b"")
        return self.token_text(token).encode()

    def detokenizer(self, after: Sequence[int] = ()) -> IncrementalDetokenizer:
        """For one stream. ``after`` is the prompt that the stream goes on from, when both are one
        text: some tokenizers drop a blank at the start of a text."""
        if self.table is not None:
            return TableDetokenizer(self.table, after)
        return WindowDetokenizer(lambda tokens: self.codec.decode(tokens, skip_special=True), after)

    def render_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a chat; raises Rejected("invalid") if the model has no template, or its
        template refuses the messages."""
        if self.chat_template is None:
            raise Rejected(
                "invalid", "the model has no chat template: send a prompt to /v1/completions"
            )
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)


_BYTES = 256
BYTE_BOS, BYTE_EOS = 256, 257
_BYTE_SPECIALS = {BYTE_BOS: "<|bos|>", BYTE_EOS: "<|eos|>"}


class _ByteCodec:
    """A token is a byte; text never becomes a special token, whatever it spells."""

    vocab_size = _BYTES + len(_BYTE_SPECIALS)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        tokens = list(text.encode())
        return [BYTE_BOS, *tokens] if add_special_tokens else tokens

    def decode(self, tokens: Sequence[int], *, skip_special: bool) -> str:
        names = {} if skip_special else {id_: t.encode() for id_, t in _BYTE_SPECIALS.items()}
        data = b"".join([_ONE_BYTE[t] if 0 <= t < _BYTES else names.get(t, b"") for t in tokens])
        return data.decode(errors="replace")


_ONE_BYTE = [bytes([byte]) for byte in range(_BYTES)]


def byte_tokenizer() -> Tokenizer:
    """The tokenizer of a model without a checkpoint folder: any text, one token a byte."""
    special_ids = tuple(_BYTE_SPECIALS)
    return Tokenizer(
        codec=_ByteCodec(),
        table=TokenTable.of(dict(enumerate(_ONE_BYTE)), special_ids=special_ids),
        chat_template=ChatTemplate(BUILT_IN_TEMPLATE, {}),
        special_tokens=dict(_BYTE_SPECIALS),
        bos_id=BYTE_BOS,
        eos_ids=frozenset({BYTE_EOS}),
    )

"""The base of everything that crosses a process boundary, and the one codec for it.

Rules of evolution: new fields need a default; a field is never renamed, retyped or reused;
``array_like`` structs only append. Unknown fields are ignored on the wire, so that old and new
processes meet during a rolling restart. A breaking change is a new type on ``v2`` subjects.
"""

from typing import TypeVar

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all wire messages of the control plane, and of the events made by timers."""


class DataMessage(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, omit_defaults=True, gc=False
):
    """Base of the data plane's messages: hot, small, append-only.

    ``gc=False`` is safe because they hold only scalars and lists of scalars or of each other:
    a cycle cannot form.
    """


M = TypeVar("M", bound=Message | DataMessage)

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type, msgspec.msgpack.Decoder[object]] = {}


def encode(message: Message | DataMessage) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes, as_type: type[M]) -> M:
    """Decode ``payload``; raises ``msgspec.ValidationError`` or ``msgspec.DecodeError``."""
    decoder = _decoders.get(as_type)
    if decoder is None:
        decoder = _decoders[as_type] = msgspec.msgpack.Decoder(as_type)
    try:
        return decoder.decode(payload)  # type: ignore[return-value]  # keyed by its own type
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec has no error of its own here
        raise msgspec.DecodeError(str(error)) from None

"""Requests on their way from one leader to another: what is asked, and the frames of the answer.

First the head, then frames of states, an empty one at the end. Each state is encoded and decoded by
itself, away from the event loop: whoever else needs the interpreter gets it in between. While the
old replica runs, states travel without their tokens, which only the last answer has to bring.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from services.worker.attempts import Attempt, arrives_as
from services.worker.engine.interface import LiveState
from services.worker.peers.link import PeerLink, connect
from shared.errors import PeerLost
from shared.messages.base import decode, encode
from shared.messages.requests import RequestState, RequestStates

ASK_S_MAX = 2.0  # for an old leader's first word, and for each frame after it
FRAME_BYTES = 1 << 20  # of states, but for one that is larger by itself
STATES_BYTES_MAX = 1 << 30  # of one answer

_encoder = msgspec.msgpack.Encoder()
_frames = msgspec.msgpack.Decoder(list[msgspec.Raw])
_states = msgspec.msgpack.Decoder(RequestState)


def topic_of(replica_id: str) -> str:
    """Where a replica's leader is asked for its requests."""
    return f"requests/{replica_id}"


class StatesWanted(msgspec.Struct, frozen=True, array_like=True):
    """What falls to replica ``taker`` by these rows (see Shares); with ``whole``, tokens too."""

    taker: str
    rows: dict[str, dict[str, float]]
    whole: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What an old replica has of what falls to the taker, oldest first; ``attempts`` by key."""

    head: RequestStates
    attempts: dict[str, Attempt]
    states: list[LiveState]


def wanted_of(hello: bytes) -> StatesWanted:
    """Raises PeerLost."""
    try:
        return msgspec.msgpack.decode(hello, type=StatesWanted)
    except msgspec.DecodeError as error:
        raise PeerLost(f"the caller asks in other words: {error}") from error


def send_states(link: PeerLink, head: RequestStates, states: Iterable[RequestState]) -> None:
    """Raises PeerLost."""
    link.send(encode(head))
    frame: list[msgspec.Raw] = []
    size = 0
    for state in states:
        one = _encoder.encode(state)
        if frame and size + len(one) > FRAME_BYTES:
            link.send(_encoder.encode(frame))
            frame, size = [], 0
        frame.append(msgspec.Raw(one))
        size += len(one)
    if frame:
        link.send(_encoder.encode(frame))
    link.send(_encoder.encode([]))


def ask_states(
    address: str, topic: str, wanted: StatesWanted, *, timeout_s: float
) -> tuple[RequestStates, list[RequestState]]:
    """Raises PeerLost, too where the peer answers in other words or more than STATES_BYTES_MAX.
    ``timeout_s`` is for the first word, and for each frame after it."""
    deadline_s = time.monotonic() + timeout_s
    link = connect(address, topic, _encoder.encode(wanted), timeout_s=timeout_s)
    try:
        head = decode(link.recv(deadline_s - time.monotonic()), RequestStates)
        states: list[RequestState] = []
        size = 0
        while frame := _frames.decode(payload := link.recv(timeout_s)):
            size += len(payload)
            if size > STATES_BYTES_MAX:
                raise PeerLost(
                    f"{link.peer} has more than {STATES_BYTES_MAX} bytes of requests to hand over"
                )
            states += [_states.decode(one) for one in frame]
    except msgspec.DecodeError as error:  # ValidationError included
        raise PeerLost(f"{link.peer} answers in other words: {error}") from error
    finally:
        link.close()
    return head, states


async def ask_leader(replica_id: str, address: str, wanted: StatesWanted) -> Answer:
    """Raises PeerLost."""
    if not address:
        raise PeerLost(f"nobody said where the leader of {replica_id} is reached")

    def ask() -> Answer:
        head, states = ask_states(address, topic_of(replica_id), wanted, timeout_s=ASK_S_MAX)
        found = (Attempt.of(state) for state in states)
        attempts = {attempt.key: attempt for attempt in found}
        return Answer(head, attempts, [arrives_as(state) for state in states])

    return await asyncio.to_thread(ask)

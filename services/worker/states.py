"""Requests on their way from one leader to another: what is asked, and the answer in frames.

A frame is a RequestStates, small enough that whoever else needs the interpreter gets it in between;
all is encoded and decoded away from the event loop. While the old replica runs, requests travel
without their tokens, which only the last answer has to bring.
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
FRAME_TOKENS = 1 << 16  # and blocks, in one frame, unless one request has more
REQUEST_TOKENS = 64  # as large as that is a request at least
STATES_BYTES_MAX = 1 << 30  # of one answer


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
    """``head`` is repeated in each frame. Raises PeerLost."""
    frame: list[RequestState] = []
    size = 0
    for state in states:
        tokens = len(state.prompt_tokens) + len(state.output_tokens) + len(state.blocks)
        if frame and size + tokens > FRAME_TOKENS:
            link.send(encode(msgspec.structs.replace(head, states=tuple(frame), more=True)))
            frame, size = [], 0
        frame.append(state)
        size += REQUEST_TOKENS + tokens
    link.send(encode(msgspec.structs.replace(head, states=tuple(frame))))


def ask_states(
    address: str, topic: str, wanted: StatesWanted, *, timeout_s: float
) -> tuple[RequestStates, list[RequestState]]:
    """The last frame, for what all have in common, and the states of all. Raises PeerLost, too
    where the peer answers in other words or more than STATES_BYTES_MAX. ``timeout_s`` is for the
    first frame, and for each after it."""
    deadline_s = time.monotonic() + timeout_s
    link = connect(address, topic, msgspec.msgpack.encode(wanted), timeout_s=timeout_s)
    states: list[RequestState] = []
    size = 0
    try:
        while True:
            payload = link.recv(deadline_s - time.monotonic())
            size += len(payload)
            if size > STATES_BYTES_MAX:
                raise PeerLost(
                    f"{link.peer} has more than {STATES_BYTES_MAX} bytes of requests to hand over"
                )
            frame = decode(payload, RequestStates)
            states += frame.states
            if not frame.more:
                return frame, states
            deadline_s = time.monotonic() + timeout_s
    except msgspec.DecodeError as error:  # ValidationError included
        raise PeerLost(f"{link.peer} answers in other words: {error}") from error
    finally:
        link.close()


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

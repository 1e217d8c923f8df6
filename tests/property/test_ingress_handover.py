"""Live switches as the ingress sees them, in any interleaving of what the replicas say: each token
once, and no attempt that was not needed."""

import asyncio
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from services.ingress.handover import HANDOVER_S
from shared.messages.requests import TokenChunk
from tests.support.ingress_driver import DrivenGateway


@dataclass
class Said:
    """One message of a home on its way; its messages keep their order, those of others do not."""

    home: int
    chunk: TokenChunk
    arrivals: int = 1


@dataclass
class Story:
    """A stream's tokens, cut into the chunks of each home in turn."""

    tokens: list[int]
    queues: list[list[Said]] = field(default_factory=list[list[Said]])


@st.composite
def stories(draw: st.DrawFn) -> Story:
    length = draw(st.integers(2, 16))
    tokens = [100 + index for index in range(length)]
    homes = draw(st.integers(2, 4))
    cuts = sorted(draw(st.lists(st.integers(0, length), min_size=homes - 1, max_size=homes - 1)))
    bounds = [0, *cuts, length]
    story = Story(tokens)
    for home in range(homes):
        first, last = bounds[home], bounds[home + 1]
        chunks = [_chunk(0, [])]  # the acknowledgement that makes it the home
        while first < last:
            size = draw(st.integers(1, last - first))
            chunks.append(_chunk(first, tokens[first : first + size]))
            first += size
        if home == homes - 1:
            chunks.append(TokenChunk(request_id="a", attempt=0, position=length, finish="length"))
        elif draw(st.booleans()):  # what it should not say of what lives elsewhere
            failed = TokenChunk(request_id="a", attempt=0, finish="failed", failure="draining")
            chunks.append(failed)
        repeats = [draw(st.integers(1, 2)) for _ in chunks]
        said = [Said(home, chunk, count) for chunk, count in zip(chunks, repeats, strict=True)]
        story.queues.append(said)
    return story


def _chunk(position: int, tokens: list[int]) -> TokenChunk:
    return TokenChunk(request_id="a", attempt=0, position=position, tokens=tokens)


@given(story=stories(), data=st.data())
def test_each_token_once_and_no_spurious_attempt(story: Story, data: st.DataObject) -> None:
    """A home takes over when the one before has acknowledged; from then on their words cross in any
    order within the time in which they may, some of them twice. A hand-back that comes before the
    takeover that it belongs to is no lie, and stays out."""
    driven = DrivenGateway()
    one, choice = driven.open(output_tokens_max=len(story.tokens))
    driven.route(one, replica_id="r0")
    arrived: set[int] = set()
    while any(story.queues):
        ready = [
            queue
            for index, queue in enumerate(story.queues)
            if queue and (index == 0 or index - 1 in arrived) and _may_come(queue[0], arrived)
        ]
        queue = data.draw(st.sampled_from(ready))
        said = queue[0]
        said.arrivals -= 1
        if said.arrivals == 0:
            queue.pop(0)
        arrived.add(said.home)
        driven.chunks(
            said.chunk,
            replica_id=f"r{said.home}",
            incarnation=f"i{said.home}",
            worker_id=f"w{said.home}",
        )
        assert choice.tokens == story.tokens[: len(choice.tokens)]
        driven.sweep(after_s=HANDOVER_S / 200)
    asyncio.run(driven.settle())
    assert choice.tokens == story.tokens
    assert choice.ends == ["length"]
    assert (one.attempt, one.moves) == (0, 0)
    assert one.replica_id == f"r{len(story.queues) - 1}"
    assert driven.counted("ingress_moved_live") == len(story.queues) - 1


def _may_come(said: Said, arrived: set[int]) -> bool:
    return said.chunk.finish != "failed" or said.home + 1 in arrived

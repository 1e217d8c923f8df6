# pyright: reportUnknownMemberType=false
# (nats-py leaves parts of its signatures untyped)
"""What the broker keeps for us: the bucket of state and the bounded stream of events."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.kv import KeyValue

from shared.errors import BusUnavailable, PayloadTooLarge
from shared.subjects import EVENTS

STATE_BUCKET = "OSERVE_STATE"
EVENT_STREAM = "OSERVE_EVENTS"
STATE_BYTES_MAX = 8 << 20
STATE_HISTORY = 8  # revisions kept per key, for whoever asks what was there before
HISTORY_MAX = 10_000  # events of one look at the journal
_FETCH_MAX = 256
_READER_LIVES_S = 10.0  # a reader that dies without a word is forgotten by the broker after this


@dataclass(frozen=True, slots=True)
class Kept:
    """One event of the journal. ``at_s``: when the broker took it, unix seconds."""

    at_s: float
    subject: str
    payload: bytes


class Storage:
    """State and events of one connection; see the Bus protocol for what each method promises."""

    def __init__(self, client: Client, bucket: KeyValue, jetstream: JetStreamContext) -> None:
        self._client, self._bucket, self._jetstream = client, bucket, jetstream

    async def load(self, key: str) -> tuple[bytes | None, int]:
        try:
            entry = await self._bucket.get(key)
        except nats.js.errors.KeyNotFoundError as error:
            # A deleted key still has a revision, and writing it again needs that one.
            gone = cast("KeyValue.Entry | None", error.entry)
            return None, (gone.revision or 0) if gone else 0
        except (TimeoutError, nats.errors.Error) as error:
            raise BusUnavailable(f"cannot read state {key}: {error!r}") from error
        return entry.value, entry.revision or 0

    async def store(self, key: str, value: bytes, *, revision: int) -> int | None:
        try:
            return await self._bucket.update(key, value, last=revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            return None
        except nats.errors.MaxPayloadError:
            raise PayloadTooLarge(
                subject=key, size_bytes=len(value), limit_bytes=self._client.max_payload
            ) from None
        except (TimeoutError, nats.errors.Error) as error:
            raise BusUnavailable(f"cannot write state {key}: {error!r}") from error

    async def history(self, subject: str, *, limit: int, since_s: float) -> list[Kept]:
        assert limit > 0, limit
        try:
            return await self._read(subject, min(limit, HISTORY_MAX), since_s)
        except (TimeoutError, nats.errors.Error) as error:
            raise BusUnavailable(f"cannot read events {subject}: {error!r}") from error

    async def _read(self, subject: str, limit: int, since_s: float) -> list[Kept]:
        reader = ConsumerConfig(
            filter_subject=subject,
            deliver_policy=DeliverPolicy.BY_START_TIME,
            opt_start_time=datetime.fromtimestamp(since_s, UTC),
            ack_policy=AckPolicy.NONE,
            inactive_threshold=_READER_LIVES_S,
            mem_storage=True,
        )
        if await self._count(reader) > limit:
            start = await self._sequence_of_newest(reader, limit)
            reader = _from_sequence(reader, start)
        info = await self._jetstream.add_consumer(EVENT_STREAM, reader)
        try:
            return await self._fetch(info.name, min(info.num_pending or 0, limit))
        finally:
            await self._jetstream.delete_consumer(EVENT_STREAM, info.name)

    async def _count(self, reader: ConsumerConfig) -> int:
        """How many events the reader would get."""
        info = await self._jetstream.add_consumer(EVENT_STREAM, reader)
        await self._jetstream.delete_consumer(EVENT_STREAM, info.name)
        return info.num_pending or 0

    async def _sequence_of_newest(self, reader: ConsumerConfig, limit: int) -> int:
        """Where to start for the newest ``limit``, by bisection: the broker counts quickly, and
        would have to send everything else before them."""
        state = (await self._jetstream.stream_info(EVENT_STREAM)).state
        low, high = state.first_seq, state.last_seq + 1  # more than limit from low, fewer from high
        while high - low > 1:
            middle = (low + high) // 2
            if await self._count(_from_sequence(reader, middle)) >= limit:
                low = middle
            else:
                high = middle
        return low

    async def _fetch(self, name: str, number: int) -> list[Kept]:
        """Up to ``number`` events; fewer if the stream dropped the oldest meanwhile."""
        subscription = await self._jetstream.pull_subscribe_bind(consumer=name, stream=EVENT_STREAM)
        found: list[Kept] = []
        try:
            while len(found) < number:
                batch = min(_FETCH_MAX, number - len(found))
                found += [_kept(message) for message in await subscription.fetch(batch)]
        except nats.errors.TimeoutError:
            pass
        finally:
            await subscription.unsubscribe()
        return found


def _from_sequence(reader: ConsumerConfig, sequence: int) -> ConsumerConfig:
    return reader.evolve(
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_time=None, opt_start_seq=sequence
    )


def _kept(message: Msg) -> Kept:
    return Kept(message.metadata.timestamp.timestamp(), message.subject, message.data)


async def open_storage(
    client: Client,
    *,
    create_timeout_s: float,
    use_timeout_s: float,
    journal_bytes_max: int,
    journal_age_s_max: float,
) -> Storage:
    """Make sure that stream and bucket exist within our limits."""
    stream = StreamConfig(
        name=EVENT_STREAM,
        subjects=[EVENTS],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_bytes=journal_bytes_max,
        max_age=journal_age_s_max,
    )
    bucket = KeyValueConfig(
        bucket=STATE_BUCKET,
        history=STATE_HISTORY,
        max_bytes=STATE_BYTES_MAX,
        storage=StorageType.FILE,
    )
    jetstream = client.jetstream(timeout=create_timeout_s)
    try:
        await jetstream.add_stream(stream)
    except nats.js.errors.BadRequestError:  # exists with other limits: ours win
        await jetstream.update_stream(stream)
    await jetstream.create_key_value(bucket)
    used = client.jetstream(timeout=use_timeout_s)
    return Storage(client, await used.key_value(STATE_BUCKET), used)

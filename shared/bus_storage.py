# pyright: reportUnknownMemberType=false
# (nats-py leaves parts of its signatures untyped)
"""What the broker keeps for us: the bucket of state and the bounded stream of events."""

import nats.js.errors
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, KeyValueConfig, RetentionPolicy, StorageType, StreamConfig
from nats.js.kv import KeyValue

from shared.subjects import EVENTS

STATE_BUCKET = "OSERVE_STATE"
EVENT_STREAM = "OSERVE_EVENTS"
STATE_BYTES_MAX = 8 << 20
STATE_HISTORY = 8  # revisions kept per key, for whoever asks what was there before


async def open_storage(
    client: Client,
    *,
    create_timeout_s: float,
    use_timeout_s: float,
    journal_bytes_max: int,
    journal_age_s_max: float,
) -> KeyValue:
    """Make sure that stream and bucket exist within our limits; the bucket."""
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
    return await client.jetstream(timeout=use_timeout_s).key_value(STATE_BUCKET)

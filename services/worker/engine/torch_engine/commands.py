"""What a leader tells its followers: one byte that says which command, then the command itself."""

STEP = 0
"""A step plan. Others choose a tag of their own, from 1 to 255."""


def command(tag: int, body: bytes) -> bytes:
    return bytes((tag,)) + body


def parted(payload: bytes) -> tuple[int, bytes]:
    """The tag and the body."""
    return payload[0], payload[1:]

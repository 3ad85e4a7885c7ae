"""Several sessions over one ZeroMQ connection: a process's pools share its link.

A process's routing id begins with `PROCESS_PREFIX`; each of its frames, both ways, begins with the number of a
*channel*, one for each pool. The broker knows the *session* by both together. What has another routing id (the command
line) has one session, and frames without a channel.
"""

from __future__ import annotations

PROCESS_PREFIX = b"p"
_PROCESS_BYTES = 16
_CHANNEL_BYTES = 4


def channel_number(number: int) -> bytes:
    """Return a channel's name."""
    return number.to_bytes(_CHANNEL_BYTES)


def add_channel(channel: bytes, body: bytes) -> bytes:
    """Return a frame of a channel."""
    return channel + body


def split_channel(frame: bytes) -> tuple[bytes, bytes]:
    """Return the channel of a frame, and its body."""
    return frame[:_CHANNEL_BYTES], frame[_CHANNEL_BYTES:]


def to_session(routing_id: bytes, frame: bytes) -> tuple[bytes, bytes]:
    """Return which session a frame is from, and its body."""
    if not _has_channels(routing_id):
        return routing_id, frame
    channel, body = split_channel(frame)
    return routing_id + channel, body


def from_session(session: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Return the routing id and the frame by which `body` reaches a session."""
    routing_id = session[:_PROCESS_BYTES]
    if len(session) == _PROCESS_BYTES or not _has_channels(routing_id):
        return session, body
    return routing_id, add_channel(session[_PROCESS_BYTES:], body)


def is_of_former_connection(routing_id: bytes, frame: bytes) -> bool:
    """Say whether a process has sent this over a connection in whose place it has made another since.

    ZeroMQ gives that one its routing id, and the former one an id of its own making, of 5 bytes. What the process had
    said there is void: over the new connection it has said HELLO.
    """
    return (
        len(routing_id) == 5 and routing_id[:1] == b"\0" and frame[:1] == b"\0"
    )  # no message begins like a channel


def _has_channels(routing_id: bytes) -> bool:
    return len(routing_id) == _PROCESS_BYTES and routing_id.startswith(PROCESS_PREFIX)

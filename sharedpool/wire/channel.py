"""Several sessions over one ZeroMQ connection: a process's pools share its link.

A process's routing id begins with `PROCESS_PREFIX`. Each of its frames, both ways, begins with the
number of a *channel*, one for each pool. Both together name the *session*. A peer with another
routing id, such as the command line, has one session and frames without a channel.
"""

from __future__ import annotations

PROCESS_PREFIX = b"p"
_PROCESS_BYTES = 16
_CHANNEL_BYTES = 4


def channel_number(number: int) -> bytes:
    """Return a channel's number as bytes."""
    return number.to_bytes(_CHANNEL_BYTES)


def add_channel(channel: bytes, body: bytes) -> bytes:
    """Return a channel's frame with this body."""
    return channel + body


def split_channel(frame: bytes) -> tuple[bytes, bytes]:
    """Return a frame's channel and body."""
    return frame[:_CHANNEL_BYTES], frame[_CHANNEL_BYTES:]


def to_session(routing_id: bytes, frame: bytes) -> tuple[bytes, bytes]:
    """Return the session that a frame is from, and the frame's body."""
    if not _has_channels(routing_id):
        return routing_id, frame
    channel, body = split_channel(frame)
    return routing_id + channel, body


def from_session(session: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Return the routing id and the frame that take `body` to a session."""
    routing_id = session[:_PROCESS_BYTES]
    if len(session) == _PROCESS_BYTES or not _has_channels(routing_id):
        return session, body
    return routing_id, add_channel(session[_PROCESS_BYTES:], body)


def is_of_former_connection(routing_id: bytes, frame: bytes) -> bool:
    """Return True if a frame came over a connection that its process has replaced since.

    ZeroMQ gives the process's routing id to the new connection, and a generated one of 5 bytes to
    the old one. The frame counts no more, as the process sends HELLO over the new connection.
    """
    # A message never begins with the zero byte with which a channel's number begins.
    return len(routing_id) == 5 and routing_id[:1] == b"\0" and frame[:1] == b"\0"


def _has_channels(routing_id: bytes) -> bool:
    return len(routing_id) == _PROCESS_BYTES and routing_id.startswith(PROCESS_PREFIX)

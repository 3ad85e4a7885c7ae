"""The reset of a session that moves: its giver sends it and waits for nothing, its receiver reads the answer.

So the server is at it while the receiver is being woken. libpq has no part in that: the giver's would wait for the
answer, and the receiver's would not expect one. The messages are those of a simple query (PostgreSQL's documentation,
"Frontend/Backend Protocol").
"""

from __future__ import annotations

import functools
import select
import socket
import struct
import time

import msgspec

from sharedpool.descriptors.owned import NO_SIGNAL, Owned
from sharedpool.postgres.peer_closed import borrow
from sharedpool.worker import greenlets

# A reset that takes longer is not waited for: the connection is closed instead.
LIMIT_S = 1.0
_USUALLY_MS = 1
# The answer is some twenty bytes and what the server reports of settings that have changed.
_MOST_BYTES, _PIECE_BYTES = 65536, 4096
_HEAD = struct.Struct("!ci")  # a message's kind; its length, without the kind
_INT_BYTES = 4
_QUERY, _ERROR, _PARAMETER_STATUS, _READY = b"Q", b"E", b"S", b"Z"
# What else may come: CommandComplete, NoticeResponse; NotificationResponse, of what the giver's user has listened to.
_EXPECTED = (b"C", b"N", b"A")
_IDLE = b"I"
# What needs no second look: nothing but that it is done (CommandComplete, ReadyForQuery).
_USUAL = frozenset(
    _HEAD.pack(b"C", len(tag) + 5) + tag + b"\0" + _HEAD.pack(_READY, 5) + _IDLE
    for tag in (b"DISCARD ALL", b"UNLISTEN")
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[str, str]).decode


def send(number: int, command: bytes) -> bool:
    """Send a command on the socket of a connection that rests; return whether that was done. Does not block.

    libpq does not know of it: the connection object must be taken off the session, or closed.
    """
    message = query(command)
    try:
        return borrow(number).send(message, NO_SIGNAL) == len(message)
    except OSError:
        return False


@functools.lru_cache(maxsize=16)
def query(command: bytes) -> bytes:
    """Return the message of a simple query."""
    return _HEAD.pack(_QUERY, len(command) + 5) + command + b"\0"


def parameters_after(sock: Owned, parameters: bytes, limit_s: float = LIMIT_S) -> bytes | None:
    """Read the answer to a reset that was sent; return what the session's parameters are after it.

    `parameters` are those of before (msgpack of a map). Return None when the reset has failed, or was not done within
    `limit_s` seconds or one: the session is not to be used. Blocks for that long at most.
    """
    try:
        changed = _read(sock, time.monotonic() + min(limit_s, LIMIT_S))
    except (OSError, ValueError):
        return None
    if not changed:
        return None if changed is None else parameters
    before = _decode(parameters)
    # Others are reported by a server of another version than the giver's libpq knew: nobody asks for them.
    return _encode(before | {name: value for name, value in changed.items() if name in before})


def _read(sock: Owned, deadline: float) -> dict[str, str] | None:
    """Return what the server reports until it is ready for the next command; None when that is not as it should be."""
    poller: select.poll | None = None
    received, changed = b"", dict[str, str]()
    while len(received) < _MOST_BYTES:
        try:
            more = sock.recv(_PIECE_BYTES, socket.MSG_DONTWAIT)  # it has come, as a rule
        except BlockingIOError:
            if poller is None:
                poller = greenlets.poller()
                poller.register(sock.fileno(), select.POLLIN)
            # Most are done within a millisecond, for which a greenlet would be put aside for longer.
            if not (
                poller.poll(_USUALLY_MS)
                or greenlets.wait(poller, max(0.0, deadline - time.monotonic()))
            ):
                return None
            continue
        if not more:
            return None  # the backend has ended
        received += more
        if received in _USUAL:
            return changed
        while len(received) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(received)
            if len(received) <= length:
                break
            if length < _INT_BYTES:
                return None
            body, received = received[_HEAD.size : length + 1], received[length + 1 :]
            if kind == _READY:
                return changed if body == _IDLE and not received else None
            if kind == _PARAMETER_STATUS:
                name, value, _ = body.decode("utf-8", "replace").split("\0")
                changed[name] = value
            elif kind not in _EXPECTED:
                return None
    return None

"""The reset of a session that moves: the giver sends it, the receiver reads the answer.

So the server resets the session while the receiver is being woken. libpq takes no part: the giver's
would wait for the answer, and the receiver's does not expect one. The messages are those of a
simple query (PostgreSQL's documentation, "Frontend/Backend Protocol").
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

# A connection whose reset takes longer is closed.
LIMIT_S = 1.0
_USUALLY_MS = 1
# An answer has about twenty bytes, and reports of the parameters that have changed.
_MAX_BYTES, _PIECE_BYTES = 65536, 4096
_HEAD = struct.Struct("!ci")  # a message's kind, and its length without the kind
_INT_BYTES = 4
_QUERY, _PARAMETER_STATUS, _READY = b"Q", b"S", b"Z"
# Ignored: CommandComplete, NoticeResponse, and NotificationResponse for the giver's LISTEN.
_IGNORED = (b"C", b"N", b"A")
_IDLE = b"I"
# Whole answers that report nothing: CommandComplete and ReadyForQuery.
_USUAL = frozenset(
    _HEAD.pack(b"C", len(tag) + 5) + tag + b"\0" + _HEAD.pack(_READY, 5) + _IDLE
    for tag in (b"DISCARD ALL", b"UNLISTEN")
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[str, str]).decode


def send(number: int, command: bytes) -> bool:
    """Send a command on an idle connection's socket; return False if that failed. Does not block.

    libpq does not know of it, so the connection object must be vacated or closed.
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
    """Read the answer to a reset; return the session's parameters after it, or None.

    `parameters` are those from before the reset, as msgpack of a map. None means that the reset has
    failed or took more than `limit_s` seconds or one: the session must not be used.
    """
    try:
        changed = _read(sock, time.monotonic() + min(limit_s, LIMIT_S))
    except (OSError, ValueError):
        return None
    if not changed:
        return parameters
    before = _decode(parameters)
    # A newer server reports more than the giver's libpq knew; nobody asks for those.
    return _encode(before | {name: value for name, value in changed.items() if name in before})


def _read(sock: Owned, deadline: float) -> dict[str, str]:
    """Return the parameters that the server reports before it is ready for the next command.

    Raise OSError or ValueError if the answer fails to come, or is not that of a successful reset.
    """
    received, changed = b"", dict[str, str]()
    while len(received) < _MAX_BYTES:
        received += _receive(sock, deadline)
        if received in _USUAL:
            return changed
        while (message := _first_message(received)) is not None:
            kind, body, received = message
            if kind == _READY:
                if body != _IDLE or received:
                    raise ValueError("the session is not ready for the next command")
                return changed
            if kind == _PARAMETER_STATUS:
                name, value, _ = body.decode("utf-8", "replace").split("\0")
                changed[name] = value
            elif kind not in _IGNORED:
                raise ValueError(f"an unexpected message of kind {kind!r}")
    raise ValueError("a message that is too long")


def _receive(sock: Owned, deadline: float) -> bytes:
    """Return the next bytes. Raise OSError if the backend has ended, or at `deadline`."""
    poller: select.poll | None = None
    while True:
        try:
            received = sock.recv(_PIECE_BYTES, socket.MSG_DONTWAIT)  # usually it is there already
        except BlockingIOError:
            if poller is None:
                poller = greenlets.poller()
                poller.register(sock.fileno(), select.POLLIN)
            # Most resets are done within a millisecond. A greenlet that waits takes longer to go
            # on, so the whole thread waits that long first.
            left_s = max(0.0, deadline - time.monotonic())
            if not (poller.poll(_USUALLY_MS) or greenlets.wait(poller, left_s)):
                raise TimeoutError from None
            continue
        if not received:
            raise ConnectionResetError
        return received


def _first_message(received: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Return the first message's kind and body, and the rest; None if it is incomplete."""
    if len(received) < _HEAD.size:
        return None
    kind, length = _HEAD.unpack_from(received)
    if length < _INT_BYTES:
        raise ValueError("a message of negative length")
    if len(received) <= length:
        return None
    return kind, received[_HEAD.size : length + 1], received[length + 1 :]

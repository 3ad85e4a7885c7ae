"""Find out whether libpq has read everything that a session's server has sent.

When a connection object is taken off its session, half a message may be left in libpq's buffer. It
would swallow the start of what the next session's server says.
"""

from __future__ import annotations

import _socket
import errno
import itertools
import os
import struct
from typing import ClassVar

from psycopg2.extensions import connection

from sharedpool.descriptors.owned import Identity, close_if_ours, identity, is_still
from sharedpool.postgres.libpq import library

# The probe is a ParameterStatus message, of a parameter that no server has.
_PARAMETER_STATUS = b"S"
_NAME = b"sharedpool_probe"
_values = itertools.count(1)


class Probe:
    """A socket that says one message to libpq. Raise OSError if none can be had.

    Put `fileno()` in the place of the connection's socket before `is_passed`, and something else
    afterwards.
    """

    # Sockets on which libpq has read everything, for reuse, since to make them takes longer than
    # all the rest. They are kept by process, because a child inherits them.
    _pairs: ClassVar[dict[int, list[_Pair]]] = {}

    def __init__(self) -> None:
        self._value = b"%d" % next(_values)
        try:
            self._pair = self._pairs[os.getpid()].pop()
        except (KeyError, IndexError):
            self._pair = _Pair()
        body = _NAME + b"\0" + self._value + b"\0"
        self._pair.say(_PARAMETER_STATUS + struct.pack("!i", len(body) + 4) + body)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._pair.ours.fileno()

    @property
    def identity(self) -> Identity:
        """The descriptor's identity."""
        return self._pair.identity

    def is_passed(self, conn: connection) -> bool:
        """Return True if libpq has understood the message: its buffer was empty. Does not block."""
        lib, pointer = library(), conn.pgconn_ptr
        passed = lib is not None and lib.PQconsumeInput(pointer) and not lib.PQisBusy(pointer)
        if lib is None or not passed or lib.PQparameterStatus(pointer, _NAME) != self._value:
            self._pair.close()
            return False
        self._pairs.setdefault(os.getpid(), []).append(self._pair)
        return True

    @classmethod
    def close_kept(cls) -> None:
        """Close the sockets kept for reuse, inherited ones included."""
        while cls._pairs:
            _, pairs = cls._pairs.popitem()
            while pairs:
                pairs.pop().close()


class _Pair:
    """Two connected sockets. libpq reads from `ours` what is said on the other."""

    def __init__(self) -> None:
        self.ours, self._theirs = _socket.socketpair()
        self.ours.setblocking(False)
        self._theirs.setblocking(False)
        self.identity = identity(self.ours.fileno())
        self._known = self.identity, identity(self._theirs.fileno())

    def say(self, message: bytes) -> None:
        """Send a message. Raise OSError if that fails, or if other code has closed a descriptor."""
        if not (
            is_still(self.ours.fileno(), self._known)
            and is_still(self._theirs.fileno(), self._known)
        ):
            self.close()
            raise OSError(errno.EBADF, "a descriptor was closed by code that does not own it")
        self._theirs.send(message)

    def close(self) -> None:
        """Close both sockets, unless their numbers belong to other descriptors by now."""
        close_if_ours(self.ours, self._known)
        close_if_ours(self._theirs, self._known)

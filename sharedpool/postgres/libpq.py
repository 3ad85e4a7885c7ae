"""What psycopg2 does not show of the libpq that it is linked with."""

from __future__ import annotations

import _socket
import ctypes
import errno
import functools
import itertools
import os
import re
import select
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, NamedTuple

import psycopg2
from psycopg2.extensions import connection

from sharedpool.descriptors.owned import Identity, close_if_ours, identity, is_still

_COMMAND_OK, _TUPLES_OK = 1, 2  # PGRES_COMMAND_OK, PGRES_TUPLES_OK
_NONE = -1  # no result
_SQLSTATE = ord("C")  # PG_DIAG_SQLSTATE
_BAD = 1  # CONNECTION_BAD
_FAILED, _READING, _WRITING = 0, 1, 2  # PGRES_POLLING_*
_SQLSTATE_ALONE = 3  # PQERRORS_SQLSTATE
# How libpq writes a server's error then (fe-protocol3.c, pqBuildErrorMessage3): "severity:  code", and no text.
_CODE_ALONE = re.compile(rb":  ([0-9A-Z]{5})$", re.MULTILINE)


class _Option(ctypes.Structure):
    """libpq's PQconninfoOption (libpq-fe.h)."""

    _fields_ = [
        *(
            (name, ctypes.c_char_p)
            for name in ("keyword", "envvar", "compiled", "val", "label", "dispchar")
        ),
        ("dispsize", ctypes.c_int),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the libpq that psycopg2 itself is linked with, or None where its symbols cannot be reached."""
    try:
        # dlsym on the extension module searches its dependencies too, the wheel's bundled libpq among them.
        # PyDLL keeps the interpreter's lock: nothing that is called here blocks.
        lib = ctypes.PyDLL(psycopg2._psycopg.__file__)
        lib.PQconnectStart.argtypes, lib.PQconnectStart.restype = [ctypes.c_char_p], ctypes.c_void_p
        lib.PQconninfo.argtypes, lib.PQconninfo.restype = [ctypes.c_void_p], ctypes.POINTER(_Option)
        lib.PQerrorMessage.argtypes, lib.PQerrorMessage.restype = [ctypes.c_void_p], ctypes.c_char_p
        lib.PQconninfoFree.argtypes, lib.PQconninfoFree.restype = [ctypes.POINTER(_Option)], None
        lib.PQfinish.argtypes, lib.PQfinish.restype = [ctypes.c_void_p], None
        lib.PQparameterStatus.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        lib.PQparameterStatus.restype = ctypes.c_char_p
        lib.PQsocket.argtypes, lib.PQsocket.restype = [ctypes.c_void_p], ctypes.c_int
        _declare_connects(lib)
        lib.PQgssEncInUse.argtypes, lib.PQgssEncInUse.restype = [ctypes.c_void_p], ctypes.c_int
        lib.PQsendQuery.argtypes, lib.PQsendQuery.restype = (
            [ctypes.c_void_p, ctypes.c_char_p],
            ctypes.c_int,
        )
        lib.PQconsumeInput.argtypes, lib.PQconsumeInput.restype = [ctypes.c_void_p], ctypes.c_int
        lib.PQisBusy.argtypes, lib.PQisBusy.restype = [ctypes.c_void_p], ctypes.c_int
        lib.PQgetResult.argtypes, lib.PQgetResult.restype = [ctypes.c_void_p], ctypes.c_void_p
        lib.PQresultStatus.argtypes, lib.PQresultStatus.restype = [ctypes.c_void_p], ctypes.c_int
        lib.PQgetvalue.argtypes, lib.PQgetvalue.restype = (
            [ctypes.c_void_p, ctypes.c_int, ctypes.c_int],
            ctypes.c_char_p,
        )
        lib.PQresultErrorField.argtypes = [ctypes.c_void_p, ctypes.c_int]
        lib.PQresultErrorField.restype = ctypes.c_char_p
        lib.PQclear.argtypes, lib.PQclear.restype = [ctypes.c_void_p], None
    except (AttributeError, OSError):
        return None
    return lib


def _declare_connects(lib: ctypes.CDLL) -> None:
    """Declare what tells of a connect, and makes one."""
    texts, conn = ctypes.POINTER(ctypes.c_char_p), [ctypes.c_void_p]
    lib.PQconnectStartParams.argtypes, lib.PQconnectStartParams.restype = (
        [texts, texts, ctypes.c_int],
        ctypes.c_void_p,
    )
    lib.PQsetErrorVerbosity.argtypes, lib.PQsetErrorVerbosity.restype = (
        [ctypes.c_void_p, ctypes.c_int],
        ctypes.c_int,
    )
    for name in ("PQconnectPoll", "PQstatus", "PQconnectionUsedPassword"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = conn, ctypes.c_int
    for name in ("PQhost", "PQhostaddr", "PQport"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = conn, ctypes.c_char_p


def options(lib: ctypes.CDLL, conn: int) -> dict[str, str] | None:
    """Return the options of a PGconn that have a value, or None when libpq gives none."""
    options = lib.PQconninfo(conn)
    if not options:
        return None
    found: dict[str, str] = {}
    index = 0
    while (option := options[index]).keyword is not None:
        if option.val is not None:
            found[option.keyword.decode()] = option.val.decode("utf-8", "surrogateescape")
        index += 1
    lib.PQconninfoFree(options)
    return found


def socket_of_failed(conn: connection) -> int | None:
    """Return the socket of a connection that could not be opened: -1 if it has none, None if there is no telling.

    libpq leaves it open until PQfinish (fe-connect.c, PQconnectPoll's error_return), psycopg2 says "closed" already.
    """
    lib = library()
    if lib is None or (pointer := _pointer_of_failed(conn)) is None:
        return None
    return int(lib.PQsocket(pointer)) if pointer else -1


def _pointer_of_failed(conn: connection) -> int | None:
    """Return a connection's PGconn: 0 if there is none yet, None if psycopg2 does not tell."""
    try:
        return conn.pgconn_ptr or 0
    except psycopg2.Error:
        return None


def parameters_of(conn: connection) -> dict[str, str]:
    """Return the parameters that an open connection was opened with, the password among them."""
    lib, pointer = library(), conn.pgconn_ptr
    return {} if lib is None or not pointer else options(lib, pointer) or {}


def parameter_statuses(conn: connection, names: Iterable[bytes]) -> tuple[bytes | None, ...]:
    """Return what the server has reported of an open connection; None for what it has not."""
    lib = library()
    assert lib is not None
    status, pointer = lib.PQparameterStatus, conn.pgconn_ptr
    return tuple(map(status, itertools.repeat(pointer), names))


# A parameter that no server has. PostgreSQL's "Frontend/Backend Protocol": ParameterStatus, its length, name, value.
_PROBE = b"sharedpool_probe"
_probes = itertools.count(1)


class Probe:
    """What shows whether libpq has read all that it was sent: half a message may lie in its buffer, of a session that
    has gone, and would swallow what the next one's server says first.

    `fileno()` is to be put in the place of the connection's socket before `is_passed`, and something else afterwards.
    Raise OSError.
    """

    # Pairs that were read to the end: making one takes longer than all the rest. By process, as a child inherits them.
    _pairs: ClassVar[dict[int, list[_Pair]]] = {}

    def __init__(self) -> None:
        self._value = b"%d" % next(_probes)
        try:
            self._pair = self._pairs[os.getpid()].pop()
        except (KeyError, IndexError):
            self._pair = _Pair()
        body = _PROBE + b"\0" + self._value + b"\0"
        self._pair.say(b"S" + struct.pack("!i", len(body) + 4) + body)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._pair.ours.fileno()

    @property
    def identity(self) -> Identity:
        """What that descriptor is."""
        return self._pair.identity

    def is_passed(self, conn: connection) -> bool:
        """Say whether libpq understands what is said to it now. Does not block."""
        lib, pointer = library(), conn.pgconn_ptr
        passed = lib is not None and lib.PQconsumeInput(pointer) and not lib.PQisBusy(pointer)
        if lib is None or not passed or lib.PQparameterStatus(pointer, _PROBE) != self._value:
            self._pair.close()
            return False
        self._pairs.setdefault(os.getpid(), []).append(self._pair)
        return True

    @classmethod
    def close_kept(cls) -> None:
        """Close what is kept for the next ones, and what was inherited of it."""
        while cls._pairs:
            _, pairs = cls._pairs.popitem()
            while pairs:
                pairs.pop().close()


class _Pair:
    """Two sockets: what one end says is read from the other, by libpq. What libpq says there nobody reads.

    Raise OSError when it cannot be had.
    """

    def __init__(self) -> None:
        self.ours, self._theirs = _socket.socketpair()
        self.ours.setblocking(False)
        self._theirs.setblocking(False)
        self.identity = identity(self.ours.fileno())
        self._known = self.identity, identity(self._theirs.fileno())

    def say(self, message: bytes) -> None:
        """Raise OSError when it cannot be said, or its numbers are somebody else's by now."""
        if not (
            is_still(self.ours.fileno(), self._known)
            and is_still(self._theirs.fileno(), self._known)
        ):
            self.close()
            raise OSError(errno.EBADF, "somebody has closed what is not his")
        self._theirs.send(message)

    def close(self) -> None:
        """Close both, unless their numbers are somebody else's by now."""
        close_if_ours(self.ours, self._known)
        close_if_ours(self._theirs, self._known)


def socket_of(conn: connection) -> int:
    """Return an open connection's socket, even if psycopg2 takes it for closed (`worker/connection/closed_flag.py`)."""
    lib = library()
    assert lib is not None
    return int(lib.PQsocket(conn.pgconn_ptr))


class Tried(NamedTuple):
    """How far libpq came with a connect that failed: the address it tried last, and whether a password was asked for.

    `hostaddr` is empty for a unix socket, and where nothing was tried at all: no address was found, or an option is
    not valid.
    """

    host: str
    hostaddr: str
    port: str
    asked_password: bool


def tried(conn: connection) -> Tried | None:
    """Return how far a connect that failed has come; None where there is no telling."""
    lib = library()
    if lib is None or not (pointer := _pointer_of_failed(conn)):
        return None
    host, hostaddr, port = (
        (getattr(lib, name)(pointer) or b"").decode("utf-8", "replace")
        for name in ("PQhost", "PQhostaddr", "PQport")
    )
    return Tried(host, hostaddr, port, bool(lib.PQconnectionUsedPassword(pointer)))


class Attempt:
    """A connect of our own, step by step, as one that failed was made: to learn the SQLSTATE of the server's refusal.

    libpq keeps that code of a failed connect to itself, but it writes it in the place of the server's text when it is
    told so (PQERRORS_SQLSTATE, libpq 12). `finish` must be called.
    """

    def __init__(self, lib: ctypes.CDLL, options: Mapping[str, str]) -> None:
        self._lib = lib
        keywords, values = (
            (ctypes.c_char_p * (len(options) + 1))(
                *(text.encode("utf-8", "surrogateescape") for text in texts), None
            )
            for texts in (options.keys(), options.values())
        )
        self._conn: int | None = lib.PQconnectStartParams(keywords, values, 0)
        self.state = _WRITING if lib.PQstatus(self._conn) != _BAD else _FAILED
        lib.PQsetErrorVerbosity(self._conn, _SQLSTATE_ALONE)

    @property
    def fd(self) -> int:
        """The socket, which changes when libpq tries another way; -1 for none."""
        return int(self._lib.PQsocket(self._conn))

    @property
    def events(self) -> int:
        """What the socket is to be polled for before the next step; 0 at the end."""
        return {_READING: select.POLLIN, _WRITING: select.POLLOUT}.get(self.state, 0)

    @property
    def failed(self) -> bool:
        """Whether it has come to nothing."""
        return bool(self.state == _FAILED)

    def step(self) -> None:
        """Go on; the socket is ready. Does not block."""
        self.state = self._lib.PQconnectPoll(self._conn)

    def codes(self) -> list[str]:
        """Return the SQLSTATEs with which servers have refused."""
        message: bytes = self._lib.PQerrorMessage(self._conn) or b""
        return [code.decode() for code in _CODE_ALONE.findall(message)]

    def finish(self) -> None:
        """Close it, and forget it."""
        conn, self._conn = self._conn, None
        if conn is not None:
            self._lib.PQfinish(conn)


def is_encrypted(conn: connection) -> bool:
    """Say whether a session's state lies in this process: TLS or GSS encryption. True where it cannot be told."""
    lib = library()
    if lib is None or conn.info.ssl_in_use:
        return True
    return bool(lib.PQgssEncInUse(conn.pgconn_ptr))


def execute(conn: connection, command: bytes, limit_s: float) -> bool:
    """Run a command that returns no rows; say whether it succeeded within `limit_s` seconds.

    psycopg2's own `execute` would wait for ever. After False the connection is good for nothing any more.
    """
    status, _ = _run(conn, command, limit_s)
    return status == _COMMAND_OK


def ask(conn: connection, query: bytes, limit_s: float) -> bytes | None:
    """Run a query that returns one value; return it, or None when it did not come within `limit_s` seconds.

    After None the connection is good for nothing any more.
    """
    status, value = _run(conn, query, limit_s)
    return value if status == _TUPLES_OK else None


def refused(
    conn: connection, query: bytes, meanwhile: Callable[[], None], limit_s: float
) -> bytes | None:
    """Run a query that is to fail, calling `meanwhile` once it has begun to answer; return the SQLSTATE of its end.

    None when it did not fail within `limit_s` seconds; the connection is good for nothing any more then.
    """
    status, code = _run(conn, query, limit_s, meanwhile)
    return None if status in (_NONE, _COMMAND_OK, _TUPLES_OK) else code


def _run(
    conn: connection, command: bytes, limit_s: float, meanwhile: Callable[[], None] | None = None
) -> tuple[int, bytes]:
    """Run a command; return its last result's status with its first value or its SQLSTATE, if it has one."""
    lib = library()
    pointer = conn.pgconn_ptr
    if lib is None or not pointer or not lib.PQsendQuery(pointer, command):
        return _NONE, b""
    deadline = time.monotonic() + limit_s
    poller = select.poll()
    poller.register(socket_of(conn), select.POLLIN)
    if meanwhile is not None and poller.poll(limit_s * 1000):
        meanwhile()
    status, value = _NONE, b""
    while True:
        if lib.PQisBusy(pointer):
            # The command fits into any socket's buffer: nothing is left to be flushed.
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poller.poll(left_s * 1000) or not lib.PQconsumeInput(pointer):
                return _NONE, b""
            continue
        result = lib.PQgetResult(pointer)
        if not result:
            return status, value
        status = lib.PQresultStatus(result)
        value = b""
        if status == _TUPLES_OK:
            value = lib.PQgetvalue(result, 0, 0) or b""
        elif status != _COMMAND_OK:
            value = lib.PQresultErrorField(result, _SQLSTATE) or b""
        lib.PQclear(result)

"""What psycopg2 does not offer of the libpq that it is linked with.

Functions that return text or numbers about a connection do not block. Those that run a command have
a time limit, which psycopg2's `execute` has not.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import select
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import psycopg2
from psycopg2.extensions import connection

_COMMAND_OK, _TUPLES_OK = 1, 2  # PGRES_COMMAND_OK, PGRES_TUPLES_OK
_NONE = -1  # no result
_SQLSTATE = ord("C")  # PG_DIAG_SQLSTATE
_BAD = 1  # CONNECTION_BAD
_FAILED, _READING, _WRITING = 0, 1, 2  # PGRES_POLLING_*
_SQLSTATE_ALONE = 3  # PQERRORS_SQLSTATE
# libpq writes a server's error as "severity:  code" then (fe-protocol3.c, pqBuildErrorMessage3).
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
    """Return the libpq that psycopg2 is linked with; None if its symbols cannot be reached."""
    try:
        # dlsym on the extension module also searches its dependencies, such as the wheel's libpq.
        # PyDLL keeps the interpreter's lock, as no function called here blocks.
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
    """Declare the functions that make a connect or tell of one."""
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
    """Return the options of a PGconn that have a value, or None if libpq gives none."""
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
    """Return the socket of a connection that could not be opened, -1 for none, None if unknown.

    libpq leaves it open until PQfinish (fe-connect.c, PQconnectPoll's error_return), though
    psycopg2's `closed` is set.
    """
    lib = library()
    if lib is None or (pointer := _pointer_of_failed(conn)) is None:
        return None
    return int(lib.PQsocket(pointer)) if pointer else -1


def _pointer_of_failed(conn: connection) -> int | None:
    """Return a connection's PGconn, 0 if there is none yet, None if psycopg2 does not tell."""
    try:
        return conn.pgconn_ptr or 0
    except psycopg2.Error:
        return None


def parameters_of(conn: connection) -> dict[str, str]:
    """Return the parameters that a connection was opened with, the password included."""
    lib, pointer = library(), conn.pgconn_ptr
    return {} if lib is None or not pointer else options(lib, pointer) or {}


def parameter_statuses(conn: connection, names: Iterable[bytes]) -> tuple[bytes | None, ...]:
    """Return what the server has reported of each parameter; None for what it has not."""
    lib = library()
    assert lib is not None
    status, pointer = lib.PQparameterStatus, conn.pgconn_ptr
    return tuple(map(status, itertools.repeat(pointer), names))


def socket_of(conn: connection) -> int:
    """Return an open connection's socket, even if it is closed to its user (`closed_flag.py`)."""
    lib = library()
    assert lib is not None
    return int(lib.PQsocket(conn.pgconn_ptr))


class Tried(NamedTuple):
    """How far libpq came with a connect that failed."""

    # The address tried last. `hostaddr` is empty for a unix socket, and also if nothing was tried,
    # because no address was found or an option is invalid.
    host: str
    hostaddr: str
    port: str
    asked_password: bool


def tried(conn: connection) -> Tried | None:
    """Return how far a failed connect has come; None if that is unknown."""
    lib = library()
    if lib is None or not (pointer := _pointer_of_failed(conn)):
        return None
    host, hostaddr, port = (
        (getattr(lib, name)(pointer) or b"").decode("utf-8", "replace")
        for name in ("PQhost", "PQhostaddr", "PQport")
    )
    return Tried(host, hostaddr, port, bool(lib.PQconnectionUsedPassword(pointer)))


class Attempt:
    """A connect, step by step, to learn the SQLSTATE with which the server refuses it.

    libpq does not tell the SQLSTATE of a failed connect. With PQERRORS_SQLSTATE (libpq 12) it
    writes the SQLSTATE in place of the error's text. `finish` must be called.
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
        """The socket, -1 for none. It changes when libpq tries another address."""
        return int(self._lib.PQsocket(self._conn))

    @property
    def events(self) -> int:
        """The events to poll the socket for before the next step; 0 at the end."""
        return {_READING: select.POLLIN, _WRITING: select.POLLOUT}.get(self.state, 0)

    @property
    def failed(self) -> bool:
        """Whether the connect has failed."""
        return bool(self.state == _FAILED)

    def step(self) -> None:
        """Go on, when the socket is ready. Does not block."""
        self.state = self._lib.PQconnectPoll(self._conn)

    def codes(self) -> list[str]:
        """Return the SQLSTATEs of the servers' refusals."""
        message: bytes = self._lib.PQerrorMessage(self._conn) or b""
        return [code.decode() for code in _CODE_ALONE.findall(message)]

    def finish(self) -> None:
        """Close the connection."""
        conn, self._conn = self._conn, None
        if conn is not None:
            self._lib.PQfinish(conn)


def is_encrypted(conn: connection) -> bool:
    """Return True if a session uses TLS or GSS encryption, or if that is unknown.

    Such a session has keys in this process and cannot move to another.
    """
    lib = library()
    if lib is None or conn.info.ssl_in_use:
        return True
    return bool(lib.PQgssEncInUse(conn.pgconn_ptr))


def execute(conn: connection, command: bytes, limit_s: float) -> bool:
    """Run a command that returns no rows; return True if it succeeded within `limit_s` seconds.

    After False the connection can only be closed.
    """
    status, _ = _run(conn, command, limit_s)
    return status == _COMMAND_OK


def ask(conn: connection, query: bytes, limit_s: float) -> bytes | None:
    """Run a query that returns one value; return it, or None after `limit_s` seconds or a failure.

    After None the connection can only be closed.
    """
    status, value = _run(conn, query, limit_s)
    return value if status == _TUPLES_OK else None


def refused(
    conn: connection, query: bytes, meanwhile: Callable[[], None], limit_s: float
) -> bytes | None:
    """Run a query that is expected to fail; return its SQLSTATE.

    `meanwhile` is called once the first data has come. Return None if the query does not fail
    within `limit_s` seconds. Then the connection can only be closed.
    """
    status, code = _run(conn, query, limit_s, meanwhile)
    return None if status in (_NONE, _COMMAND_OK, _TUPLES_OK) else code


def _run(
    conn: connection, command: bytes, limit_s: float, meanwhile: Callable[[], None] | None = None
) -> tuple[int, bytes]:
    """Run a command; return its last result's status, and its first value or its SQLSTATE."""
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
            # Nothing is left to be flushed: the command fits into any socket's buffer.
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

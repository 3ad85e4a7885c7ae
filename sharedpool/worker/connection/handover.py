"""Hand a live connection from one process to another, in place of closing it here and connecting there.

libpq cannot adopt a socket, but it knows its own by the descriptor's number alone. The giver puts a dead socket in that
number's place (`vacate`): its connection object is an empty *shell*, good for nothing until it is used again. The
receiver puts the socket that it was passed (`worker/link/desk_line.py`) into a shell of its own (`adopt`). A process's
first shells are built by connecting to a server of its own that says what PostgreSQL says at a start (`Stub`).

A session under TLS or GSS encryption has its keys in the process: it cannot be passed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import psycopg2
from psycopg2 import extensions, extras

from sharedpool.descriptors.available import FOR_A_SHELL, require
from sharedpool.descriptors.owned import NO_SIGNAL, Owned, identity, is_still
from sharedpool.postgres import libpq
from sharedpool.wire.desk import Live
from sharedpool.worker.connection import closing, renewal, reset
from sharedpool.worker.connection.closing import (
    abandon,
    descriptor_of,
    expect_descriptor,
    keep_forever,
    register,
)
from sharedpool.worker.connection.connection import pooled_class
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.server_facts import decode, facts_of
from sharedpool.worker.connection.state import ROLE_PARAMETERS, is_alive, is_unused

# An abstract address for the stub is libpq 14's.
SUPPORTED = sys.platform == "linux" and extensions.libpq_version() >= 140000

# What a server reports of itself and of the session (libpq's "Parameter Status"); later versions report more.
_REPORTED = (
    "server_version", "server_encoding", "client_encoding", "application_name", "default_transaction_read_only",
    "in_hot_standby", "is_superuser", "session_authorization", "DateStyle", "IntervalStyle", "TimeZone",
    "integer_datetimes", "standard_conforming_strings", "scram_iterations", "search_path",
)  # fmt: skip
# A trial's answer is not waited for longer; it is made once, and what it would cost to be wrong is the hand-over.
_TRIAL_LIMIT_S = 3.0
# A trial whose cancel is lost takes a second: it is made for who has the time.
PATIENT_S = 1.5
_BUILD_LIMIT_S = 5.0
DISCARD = b"DISCARD ALL"
# The first row does not fit into the server's buffer: it is sent, and tells that the query is being executed. A cancel
# that came before would be lost.
_LONG_QUERY = b"SELECT pg_catalog.repeat('x', 20000) UNION ALL SELECT pg_catalog.pg_sleep(1)::text"
_CANCELED = b"57014"
_NEGOTIATE, _REFUSE = b"v", b"N"
_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
_UCRED = struct.Struct("3i")  # pid, uid, gid

names_of_parameters = tuple(name.encode() for name in _REPORTED)

_encode = msgspec.msgpack.Encoder().encode
# There are as many different ones as databases and roles: hardly any.
_decode = functools.lru_cache(maxsize=256)(msgspec.msgpack.Decoder(dict[str, str]).decode)


def can_move(conn: PooledConnection) -> bool:
    """Say whether a connection's session can be passed to another process at all."""
    return SUPPORTED and not libpq.is_encrypted(conn)


def prepare(conn: PooledConnection, command: bytes) -> bytes | None:
    """Make a connection that is checked in ready to be given, and send its reset, `command`.

    Return its parameters of before the reset, for the receiver, or None when it must be closed instead. Afterwards it
    must be taken off its session (`vacate`), or closed: libpq does not know of the reset. Blocks for a round trip, at
    most a second, when its user has changed what the server reports.
    """
    if not is_unused(conn) or not is_alive(conn):
        return None
    encoded = parameters(conn)
    if encoded != conn.sharedpool_made_with:
        # libpq is to read what a first reset reports, else the object would be of no use for the next session here.
        if (
            not libpq.execute(conn, command, reset.LIMIT_S)
            or not is_unused(conn)
            or not is_alive(conn)
        ):
            return None
        encoded = parameters(conn)
    if command != DISCARD:  # where they are not reset, what a user has set is not to be another's
        found = _decode(encoded)
        if found.get("client_encoding") != conn.sharedpool_encoding or not reads_dates(encoded):
            return None
    if conn.sharedpool_names is None:
        conn.sharedpool_names = facts_of(conn)
    return encoded if reset.send(descriptor_of(conn), command) else None


@functools.lru_cache(maxsize=256)
def reads_dates(parameters: bytes) -> bool:
    """Say whether psycopg2 can read a session's dates."""
    return _decode(parameters).get("DateStyle", "").startswith("ISO")


def parameters(conn: extensions.connection) -> bytes:
    """Return what the server has reported of a session: msgpack of a map."""
    return encoded_parameters(libpq.parameter_statuses(conn, names_of_parameters))


@functools.lru_cache(maxsize=256)
def _server_in(parameters: bytes) -> tuple[bytes | None, ...]:
    """Return what `server_of` does, of a session with these parameters."""
    found = _decode(parameters)
    return tuple(
        [None if (value := found.get(name)) is None else value.encode() for name in ROLE_PARAMETERS]
    )


@functools.lru_cache(maxsize=256)
def encoded_parameters(values: tuple[bytes | None, ...]) -> bytes:
    """Return what `parameters` does, of these values of `names_of_parameters`."""
    found = zip(_REPORTED, values, strict=True)
    return _encode(
        {name: value.decode("utf-8", "replace") for name, value in found if value is not None}
    )


def vacate(conn: PooledConnection) -> bool:
    """Make a connection an empty shell: nothing it does reaches its session any more, its close included.

    Return whether its libpq had read all that it was sent. Half a message in its buffer would be missing to whoever
    reads on: then the session is to be ended, and the object is of no use. Raise OSError when nothing can be put in the
    place of its socket.
    """
    try:
        probe = libpq.Probe()
        os.dup2(probe.fileno(), expect_descriptor(conn, probe.identity), inheritable=False)
        conn.sharedpool_emptied = probe.is_passed(conn)
    except OSError:  # no descriptor is free
        conn.sharedpool_emptied = False
    closing.replace_socket(conn)  # what is said by mistake gets no answer from a probe
    conn.sharedpool_adopted, conn.sharedpool_native = None, False
    return conn.sharedpool_emptied


def adopt(shell: PooledConnection, sock: Owned, live: Live) -> PooledConnection:
    """Put a session's socket into a shell, which is a connection to the backend then; `sock` becomes its witness.

    When this raises, the socket is the shell's or still `sock`'s: whoever drops both has closed it, once.
    """
    shell.sharedpool_pid = os.getpid()
    os.dup2(sock.fileno(), expect_descriptor(shell, identity(sock.fileno())), inheritable=False)
    shell.sharedpool_witness = sock.detach()
    register(shell, shell.sharedpool_witness)
    shell.sharedpool_adopted, shell.sharedpool_names = live.backend, live.names
    shell.sharedpool_closed, shell.sharedpool_direct = False, live.backend.direct
    return shell


def works(conn: PooledConnection, cancel: Callable[[], None] | None) -> bool:
    """Say whether a connection that was just adopted does what a connection does: the technique's self-test.

    It must reach the backend that it should, and what it executes must end by `cancel()`, which goes by that backend
    too; where that cannot be called, None, it is not tried. Blocks for some round trips, at most three seconds each.
    After False the connection is not to be used: a late cancel might meet its user's query.
    """
    asked = b"SELECT pg_catalog.pg_backend_pid()"
    expected = b"%d" % conn.get_backend_pid()
    if libpq.ask(conn, asked, _TRIAL_LIMIT_S) != expected:
        return False
    if cancel is None:
        return True
    ended = libpq.refused(conn, _LONG_QUERY, cancel, _TRIAL_LIMIT_S)
    return ended == _CANCELED and libpq.ask(conn, asked, _TRIAL_LIMIT_S) == expected


# What a user may have set, here or in the environment, that the stub does not offer; by the libpq that knows it.
_KEYWORDS = {
    "connect_timeout": str(round(_BUILD_LIMIT_S)), "hostaddr": "", "requirepeer": "", "target_session_attrs": "any",
    "sslmode": "disable", "sslrootcert": "", "gssencmode": "disable", "channel_binding": "disable",
    **({"require_auth": ""} if extensions.libpq_version() >= 160000 else {}),
    **({"sslnegotiation": "postgres"} if extensions.libpq_version() >= 170000 else {}),
}  # fmt: skip
# Classes that keep nothing: their objects are used again, as plain ones are.
_KNOWN = (
    None,
    extensions.connection,
    extras.DictConnection,
    extras.RealDictConnection,
    extras.NamedTupleConnection,
)


class Shells:
    """One pool's empty connections in this process, by the parameters they were made with.

    As many are kept as connections were held at once since the last `trim`: each may go, and one come in its place.
    """

    def __init__(self, keywords: Mapping[str, Any]) -> None:
        """`keywords` are those for Python's side of a connection: its classes."""
        self._cursor_factory = keywords.get("cursor_factory")
        self._factory = pooled_class(keywords.get("connection_factory"))
        self.are_known = (
            keywords.get("connection_factory") in _KNOWN
        )  # else a user's code runs where one is built
        self._lock = threading.Lock()
        self._stock: OrderedDict[bytes, list[PooledConnection]] = OrderedDict()
        self._kept = 0
        self._needed = 1

    def __len__(self) -> int:
        """Return how many are kept."""
        return self._kept

    def take(self, live: Live, held: int) -> PooledConnection:
        """Return a shell for a session, as new; builds one, in less than a millisecond, if need be.

        `held`: how many connections the process has with this one. Raise `psycopg2.Error` or `OSError` when it cannot
        be built, `SharedPoolError` when only descriptors were lacking for that, or an `OSError` that says so.
        """
        parameters = _decode(live.parameters)
        while (shell := self._pop(live.parameters, held)) is not None:
            if not is_still(descriptor_of(shell), shell.sharedpool_known):
                keep_forever(shell)
                continue
            if renewal.renew(shell, parameters, self._cursor_factory):
                break
            abandon(shell)
        else:
            try:
                shell = self._build(parameters, live)
            except psycopg2.Error:
                require(
                    FOR_A_SHELL, "an empty connection"
                )  # libpq does not tell when these were lacking
                raise
            renewal.at_start(shell)
        shell.sharedpool_made_with = live.parameters
        shell.sharedpool_encoding = parameters.get("client_encoding", "")
        shell.sharedpool_server = _server_in(live.parameters)
        return shell

    def _pop(self, parameters: bytes, held: int) -> PooledConnection | None:
        with self._lock:
            self._needed = max(self._needed, held)
            stock = self._stock.get(parameters)
            self._kept -= bool(stock)
            return stock.pop() if stock else None

    def keep(self, shell: PooledConnection, parameters: bytes) -> None:
        """Keep a vacated connection for later, unless it is of a user's own class, has half a message in its buffer, or
        libpq's `parameters` are others than those that it was made with.
        """
        if (
            not (self.are_known and shell.sharedpool_emptied)
            or parameters != shell.sharedpool_made_with
        ):
            abandon(shell)
            return
        with self._lock:
            self._stock.setdefault(parameters, []).append(shell)
            self._stock.move_to_end(parameters)
            self._kept += 1
            if self._kept > self._needed:
                self._trim(self._needed)

    def trim(self, held: int) -> None:
        """Let go of what was not needed since the last call; `held` are needed now."""
        with self._lock:
            self._trim(self._needed)
            self._needed = max(1, held)

    def _trim(self, most: int) -> None:
        while self._kept > most:
            oldest, stock = next(iter(self._stock.items()))
            if stock:
                abandon(stock.pop())
                self._kept -= 1
            else:
                del self._stock[oldest]

    def _build(self, parameters: dict[str, str], live: Live) -> PooledConnection:
        names = decode(live.names)
        shell = self._factory.__new__(self._factory)
        # A user's class may ask, when it is set up.
        shell.sharedpool_adopted, shell.sharedpool_names = live.backend, live.names
        with Stub(parameters) as stub:
            server = {
                "host": stub.host,
                "port": str(stub.port),
                "options": names.options,
                **_KEYWORDS,
            }
            # Not by `psycopg2.connect`: nobody is to see, or trace, that something connects.
            try:
                shell.__init__(extensions.make_dsn(user=names.user, dbname=names.dbname, **server))  # type: ignore[misc]
                self._inspect(shell, stub)
            except BaseException:
                shell.sharedpool_close()
                raise
        if self._cursor_factory is not None:
            shell.cursor_factory = self._cursor_factory
        vacate(shell)
        return shell

    def _inspect(self, shell: PooledConnection, stub: Stub) -> None:
        """Raise when a user's class did what only a server can answer: its object is not what it should be."""
        what = f"the connection class {self._factory.__name__.removeprefix('Pooled')}"
        if shell.closed or shell.status != extensions.STATUS_READY:
            raise psycopg2.InterfaceError(
                f"{what} executes statements while it connects: configure= is for that"
            )
        if extensions.ConnectionInfo(shell).host != stub.host:
            raise psycopg2.InterfaceError(f"{what} connects elsewhere than it is told to")


class Stub:
    """A server for one start of one session, in a thread of its own, at an abstract address: there is no file."""

    port = 5432

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self._greeting = _greeting(parameters)
        self.host = f"@sharedpool-{os.getpid()}-{os.urandom(8).hex()}"
        # Where the start comes to nothing this one connects, which takes a descriptor that may not be free any more.
        self._nobody = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except BaseException:
            self._nobody.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="sharedpool-shell", daemon=True)

    def __enter__(self) -> Stub:
        try:
            self._listener.settimeout(_BUILD_LIMIT_S)
            self._listener.bind(f"\0{self.host[1:]}/.s.PGSQL.{self.port}")
            self._listener.listen(1)
            self._thread.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():  # it waits for who has not come: it is told so
            with contextlib.suppress(OSError):
                self._nobody.connect(self._listener.getsockname())
            self._nobody.close()
        self._thread.join(_BUILD_LIMIT_S)
        self._close()

    def _close(self) -> None:
        self._nobody.close()
        self._listener.close()

    def _serve(self) -> None:
        with (
            contextlib.suppress(OSError),
            self._listener,
        ):  # by its end who has connected fails at once, and says so
            client, _ = self._listener.accept()
            while not _is_ours(client):  # whoever else found the address
                client.close()
                client, _ = self._listener.accept()
            with client:
                client.settimeout(_BUILD_LIMIT_S)
                while (version := _startup(client)) in (_SSL_REQUEST, _GSS_REQUEST):
                    client.sendall(_REFUSE, NO_SIGNAL)
                newer = version & 0xFFFF
                said = (
                    _message(_NEGOTIATE, struct.pack("!ii", 0, 0)) if newer else b""
                ) + self._greeting
                client.sendall(said, NO_SIGNAL)


def _is_ours(client: socket.socket) -> bool:
    pid, _, _ = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(pid == os.getpid())


def _startup(client: socket.socket) -> int:
    """Read one packet of a client's start; return its version, or what it asks for."""
    head = client.recv(8, socket.MSG_WAITALL)
    if len(head) < 8:
        raise ConnectionError("it has left")
    size, version = struct.unpack("!ii", head)
    if size > 8:
        client.recv(size - 8, socket.MSG_WAITALL)
    return int(version)


def _greeting(parameters: Mapping[str, str]) -> bytes:
    """Return what a server says to a client that it lets in (protocol 3.0: "Start-up")."""
    status = [_message(b"S", f"{name}\0{value}\0".encode()) for name, value in parameters.items()]
    return b"".join(
        [
            _message(b"R", struct.pack("!i", 0)),
            *status,
            _message(b"K", struct.pack("!ii", 0, 0)),
            _message(b"Z", b"I"),
        ]
    )


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body

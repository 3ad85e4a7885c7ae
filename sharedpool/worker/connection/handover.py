"""Pass a live connection from one process to another, instead of a close and a connect.

libpq cannot adopt a socket, but it knows its socket only by the descriptor's number:

1. The giver checks the connection and sends the session's reset (`prepare`).
2. It replaces its descriptor by a dead socket (`vacate`). The connection object is now an empty
   *shell*.
3. The socket is passed to another process's wait socket: by the giver, in the pool's lane, or by
   the broker, which sends its own duplicate there.
4. The receiver puts the socket in the place of a shell's descriptor (`adopt`, `shells.py`).

A session under TLS or GSS encryption cannot be passed, since its keys are in the process.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

import msgspec
from psycopg2 import extensions

from sharedpool.descriptors.owned import Owned, identity
from sharedpool.postgres import buffer_probe, libpq
from sharedpool.wire.desk import Live
from sharedpool.worker.connection import closing, reset
from sharedpool.worker.connection.closing import descriptor_of, expect_descriptor, register
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.server_facts import facts_of
from sharedpool.worker.connection.state import ROLE_PARAMETERS, has_no_input, is_unused

# The stub server has an abstract unix address, which libpq knows from version 14 on.
SUPPORTED = sys.platform == "linux" and extensions.libpq_version() >= 140000

# What a server reports of itself and of the session ("Parameter Status"). Later versions report
# more.
_REPORTED = (
    "server_version", "server_encoding", "client_encoding", "application_name",
    "default_transaction_read_only", "in_hot_standby", "is_superuser", "session_authorization",
    "DateStyle", "IntervalStyle", "TimeZone", "integer_datetimes", "standard_conforming_strings",
    "scram_iterations", "search_path",
)  # fmt: skip
# For each step of the self-test. It is generous: a test that fails wrongly ends the hand-over here.
_TEST_LIMIT_S = 3.0
# A self-test whose cancel is lost takes a second, so a caller needs this much time left.
PATIENT_S = 1.5
DISCARD = b"DISCARD ALL"
# Its first row does not fit into the server's buffer and is sent at once. That tells that the query
# is being executed; a cancel that came earlier would be lost.
_LONG_QUERY = b"SELECT pg_catalog.repeat('x', 20000) UNION ALL SELECT pg_catalog.pg_sleep(1)::text"
_CANCELED = b"57014"

names_of_parameters = tuple(name.encode() for name in _REPORTED)

_encode = msgspec.msgpack.Encoder().encode
# Cached: there are hardly more different parameters than databases and roles.
decode_parameters = functools.lru_cache(maxsize=256)(msgspec.msgpack.Decoder(dict[str, str]).decode)


def can_move(conn: PooledConnection) -> bool:
    """Return True if a connection's session can be passed to another process at all."""
    return SUPPORTED and not libpq.is_encrypted(conn)


def prepare(conn: PooledConnection, command: bytes) -> bytes | None:
    """Make a connection ready to be given, and send its reset, `command`.

    Return the session's parameters from before the reset, for the receiver, or None if the
    connection must be closed instead. Afterwards it must be vacated or closed, since libpq does not
    know of the reset. Blocks for a round trip, at most a second, if the user has changed what the
    server reports.
    """
    if not is_unused(conn) or not has_no_input(conn):
        return None
    encoded = parameters(conn)
    if encoded != conn.sharedpool_made_with:
        # A first reset whose reports libpq reads, so that the shell can be used again.
        if (
            not libpq.execute(conn, command, reset.LIMIT_S)
            or not is_unused(conn)
            or not has_no_input(conn)
        ):
            return None
        encoded = parameters(conn)
    if command != DISCARD:  # parameters are not reset: the user's must not be passed on
        found = decode_parameters(encoded)
        if found.get("client_encoding") != conn.sharedpool_encoding or not reads_dates(encoded):
            return None
    if conn.sharedpool_names is None:
        conn.sharedpool_names = facts_of(conn)
    return encoded if reset.send(descriptor_of(conn), command) else None


@functools.lru_cache(maxsize=256)
def reads_dates(parameters: bytes) -> bool:
    """Return True if psycopg2 can read dates in a session with these parameters."""
    return decode_parameters(parameters).get("DateStyle", "").startswith("ISO")


def parameters(conn: extensions.connection) -> bytes:
    """Return what the server has reported of a session, as msgpack of a map."""
    return encoded_parameters(libpq.parameter_statuses(conn, names_of_parameters))


@functools.lru_cache(maxsize=256)
def role_in(parameters: bytes) -> tuple[bytes | None, ...]:
    """Return what `state.role_of_server` returns for a session with these parameters."""
    found = decode_parameters(parameters)
    return tuple(
        [None if (value := found.get(name)) is None else value.encode() for name in ROLE_PARAMETERS]
    )


@functools.lru_cache(maxsize=256)
def encoded_parameters(values: tuple[bytes | None, ...]) -> bytes:
    """Return what `parameters` returns, given the values of `names_of_parameters`."""
    found = zip(_REPORTED, values, strict=True)
    return _encode(
        {name: value.decode("utf-8", "replace") for name, value in found if value is not None}
    )


def vacate(conn: PooledConnection) -> bool:
    """Make a connection an empty shell: nothing it does reaches its session, not even its close.

    Return False if half a message is left in libpq's buffer. The receiver would miss that half, so
    the session must be ended, and the shell cannot be used. Raise OSError if its socket cannot be
    replaced.
    """
    try:
        # libpq must read a message from the probe as a whole one: then its buffer was empty.
        probe = buffer_probe.Probe()
        os.dup2(probe.fileno(), expect_descriptor(conn, probe.identity), inheritable=False)
        conn.sharedpool_emptied = probe.is_passed(conn)
    except OSError:  # no descriptor is free
        conn.sharedpool_emptied = False
    # By a dead socket, which refuses what is sent by mistake. The probe would never answer it.
    closing.replace_socket(conn)
    conn.sharedpool_adopted, conn.sharedpool_native = None, False
    return conn.sharedpool_emptied


def adopt(shell: PooledConnection, sock: Owned, live: Live) -> PooledConnection:
    """Put a session's socket into a shell, which makes it a connection; `sock` becomes its witness.

    If this raises, the socket belongs to the shell or still to `sock`. Dropping both closes it
    once.
    """
    shell.sharedpool_pid = os.getpid()
    os.dup2(sock.fileno(), expect_descriptor(shell, identity(sock.fileno())), inheritable=False)
    shell.sharedpool_witness = sock.detach()
    register(shell, shell.sharedpool_witness)
    shell.sharedpool_adopted, shell.sharedpool_names = live.backend, live.names
    shell.sharedpool_peer_closed, shell.sharedpool_direct = False, live.backend.direct
    return shell


def works(conn: PooledConnection, cancel: Callable[[], None] | None) -> bool:
    """Test whether a connection just adopted works as any other: the self-test of the hand-over.

    It must reach the right backend. Its queries must be cancelled by `cancel()`, which goes by the
    broker, and it must reach the same backend afterwards. Without `cancel` that part is left out.

    Blocks for some round trips, three seconds each at most. After False the connection must not be
    used: a late cancel might hit its user's query.
    """
    asked = b"SELECT pg_catalog.pg_backend_pid()"
    expected = b"%d" % conn.get_backend_pid()
    if libpq.ask(conn, asked, _TEST_LIMIT_S) != expected:
        return False
    if cancel is None:
        return True
    ended = libpq.refused(conn, _LONG_QUERY, cancel, _TEST_LIMIT_S)
    return ended == _CANCELED and libpq.ask(conn, asked, _TEST_LIMIT_S) == expected

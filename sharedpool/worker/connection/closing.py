"""End sessions, and see their backends gone: of a connection that is closed, cut, given away or inherited.

The *witness* tells: the connection's duplicate of its socket (`connection.py`). It tells of the backend only where
nobody is in between (`postgres/route.py`); behind a proxy the broker asks the server.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import time
import weakref
from collections.abc import Iterable

from sharedpool.descriptors.owned import NOTHING, Identity, Owned, close_if_ours, identity, is_still
from sharedpool.postgres.libpq import socket_of, socket_of_failed
from sharedpool.postgres.peer_closed import Borrowed, other_side_closed
from sharedpool.worker import greenlets
from sharedpool.worker.connection import closed_flag
from sharedpool.worker.connection.pooled import PooledConnection

# A backend exits within milliseconds of its client's close unless it is in the middle of a query.
CLOSE_LIMIT_S = 1.0
CUT_LIMIT_S = 0.2
# Tells, without reading, that the other end is closed. 0 where poll cannot tell (macOS).
PEER_CLOSED: int = getattr(select, "POLLRDHUP", 0)


def close_confirmed(conns: Iterable[PooledConnection], limit_s: float = CLOSE_LIMIT_S) -> None:
    """Close connections and wait, for all together at most `limit_s` seconds, until their backends have exited.

    One that another thread is in is cut (see there): psycopg2's close would wait for that thread's statement.

    Afterwards `conn.sharedpool_gone` tells of each whether it was seen to go; `conn.sharedpool_closed` only that the
    other side has closed it. Behind a proxy there is nothing to be seen, nor to be waited for.
    """
    closing = [(conn, take_witness(conn)) for conn in conns]
    try:
        for conn, _ in closing:
            abandon(conn)
        _end_sessions(closing, limit_s)
    finally:
        _close(closing)


def cut(conns: Iterable[PooledConnection], limit_s: float = CUT_LIMIT_S) -> None:
    """End connections that other threads may be using, without waiting for those threads.

    A backend that rests exits within `limit_s` (see `sharedpool_gone`); one in the middle of a query loses its client,
    and the query's thread gets an error when it ends: the broker ends it, or else the server, when it next looks for
    its client. One that another thread is closing is left to it.

    Only our sending half is shut down. The other one shut as well would wake the query's thread at once, but would
    look like the backend's end on the broker's duplicate of the socket.
    """
    cutting = [(conn, take_witness(conn)) for conn in conns]
    try:
        _end_sessions(cutting, limit_s)
    finally:
        _close(cutting)


def take_witness(conn: PooledConnection) -> Owned | None:
    """Take a connection's witness off it, in one step: of two threads that end it only one has it, and closes it."""
    # Once it is closed its number may be another connection's, and to the same backend: a session may come back.
    _numbers.pop(conn.sharedpool_witness, None)
    if not is_still(conn.sharedpool_witness, conn.sharedpool_known):
        conn.__dict__.pop("sharedpool_witness", None)
        return None
    try:
        return Owned(
            fileno=conn.__dict__.pop("sharedpool_witness")
        )  # one line: it always has an owner
    except KeyError:
        return None


def descriptor_of(conn: PooledConnection) -> int:
    """Return the number of libpq's descriptor: the same for as long as the object lives."""
    if conn.sharedpool_number < 0:
        conn.sharedpool_number = socket_of(conn)
    return conn.sharedpool_number


class _Holder(weakref.ref["PooledConnection"]):
    """A connection that has a descriptor. No user's reference is of this class, nor shared with one that is."""


# By number: whose it is, libpq's or the witness. A connection's finalizer may be interrupted, and is not called again;
# psycopg2 itself does not close one that is shut to its user (`closed_flag.py`).
_numbers: dict[int, tuple[_Holder, tuple[Identity, ...]]] = {}
_ownerless: dict[
    int, tuple[object, float]
] = {}  # which of them, and since when it is known to be nobody's
FINALIZING_S = 0.1  # no finalizer that goes on takes longer


def register(conn: PooledConnection, number: int) -> None:
    """Have a connection's descriptor closed some time after its end, should nobody have done that."""
    _numbers[number] = _Holder(conn), conn.sharedpool_known


def is_referred_to(conn: PooledConnection) -> bool:
    """Say whether there is a weak reference to a connection, besides this module's own."""
    entry = _numbers.get(conn.sharedpool_number)
    if entry is not None and weakref.getweakrefcount(conn) == 1 and entry[0]() is conn:
        return False
    return not set(map(type, weakref.getweakrefs(conn))) <= {_Holder}


def unregister(number: int) -> None:
    """Leave a descriptor to whoever has it now.

    Once it is closed its number may be given to another one of the same socket, as sessions come back to a process.
    """
    _numbers.pop(number, None)


def unregister_all(conn: PooledConnection) -> None:
    """Leave a connection its descriptors: it lives on without its weak references, or psycopg2 is about to end it."""
    unregister(conn.sharedpool_witness)
    unregister(socket_of_failed(conn) or -1)


def close_ownerless() -> bool:
    """Close the descriptors of connections that have been no more for `FINALIZING_S`. For the heartbeat.

    Return whether there are others, to be closed by a later call.
    """
    now, left = time.monotonic(), False
    for number, entry in list(_numbers.items()):
        whose, known = entry
        if whose() is not None:
            continue
        found, since = _ownerless.setdefault(number, (entry, now))
        if found is not entry:
            _ownerless[number] = entry, now
        elif now - since >= FINALIZING_S:
            del _ownerless[number]
            if _numbers.pop(number, None) is entry and is_still(number, known):
                os.close(number)
            continue
        left = left or is_still(number, known)
    return left


def _end_sessions(
    conns: Iterable[tuple[PooledConnection, Owned | int | None]], limit_s: float
) -> None:
    """Tell backends by their sockets that no more will come; note whose end of the socket is closed in time.

    A socket that has died here proves nothing: its backend may live on, and the broker is to see to it.
    """
    waiting: dict[int, PooledConnection] = {}
    poller = greenlets.poller()
    for conn, sock in conns:
        witness = -1 if sock is None else sock if isinstance(sock, int) else sock.fileno()
        if witness >= 0:
            # libpq has said goodbye already where it could; a session that it had given up is told here.
            _shut(witness)
            if conn.sharedpool_direct is not False:
                poller.register(witness, PEER_CLOSED or select.POLLIN)
                waiting[witness] = conn
    deadline = time.monotonic() + limit_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in greenlets.wait(poller, left):
            closed = other_side_closed(fd) if PEER_CLOSED else _read_to_end(waiting[fd], fd)
            if closed is not None:
                poller.unregister(fd)
                conn = waiting.pop(fd)
                conn.sharedpool_closed = closed
                conn.sharedpool_gone = closed and conn.sharedpool_direct is True


def end_session(
    conn: PooledConnection, witness: Owned | int | None, limit_s: float = CLOSE_LIMIT_S
) -> None:
    """End a session by its witness alone; `sharedpool_gone` as ever. The descriptor stays the caller's."""
    _end_sessions([(conn, witness)], limit_s)


def abandon(shell: PooledConnection) -> None:
    """Close a connection object, unless another thread is in the middle of a statement on it: that one drops it."""
    closed_flag.mark_broken(shell)
    if not closed_flag.is_busy(shell):
        shell.sharedpool_close()


def abort(conn: PooledConnection) -> None:
    """Close a connection for which no witness can be had (no descriptor is free); `sharedpool_gone` as ever."""
    _end_sessions([(conn, conn.fileno())], CLOSE_LIMIT_S)
    conn.sharedpool_close()


def _read_to_end(conn: PooledConnection, witness: int) -> bool | None:
    """Where poll cannot show the end of a stream: read what is left.

    Return None when there is no end yet, and whether the other side made it when there is.
    """
    if not closed_flag.is_closed_for_good(conn):
        return None  # another thread's libpq is reading it
    os.set_blocking(witness, False)
    try:
        while os.read(witness, 65536):
            pass
    except BlockingIOError:
        return None
    except OSError:
        return False  # reset, or timed out
    return True


def _shut(witness: int) -> None:
    try:
        Borrowed(fileno=witness).shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other side was faster


def _close(conns: Iterable[tuple[PooledConnection, Owned | None]]) -> None:
    for conn, witness in conns:
        if witness is not None:
            close_if_ours(witness, conn.sharedpool_known)


def close_witness(conn: PooledConnection) -> None:
    """Close a connection's witness, if it has one."""
    _close([(conn, take_witness(conn))])


_dead_socket: tuple[int, Identity] = (-1, NOTHING)


def dead_socket() -> tuple[int, Identity]:
    """Return a descriptor on which nothing can be sent, and what it is. Raise OSError when none can be had.

    Made before it is needed: a fork may find none free. Made anew when its number has become somebody else's.
    """
    global _dead_socket
    if not is_still(_dead_socket[0], _dead_socket[1:]):
        ours, theirs = socket.socketpair()
        theirs.close()
        known = identity(ours.fileno())
        _dead_socket = (ours.detach(), known)
    return _dead_socket


def replace_socket(conn: PooledConnection) -> None:
    """Take a connection's socket from under it: nothing it does reaches the session any more, its close included.

    Raise OSError when nothing can be put in its place.
    """
    number, known = dead_socket()
    os.dup2(number, expect_descriptor(conn, known), inheritable=False)


def expect_descriptor(conn: PooledConnection, known: Identity) -> int:
    """Note what libpq's descriptor is to be from now on, and return it; until it is that, it may be what it was."""
    conn.sharedpool_known = (
        *conn.sharedpool_known[-2:],
        known,
    )  # a session, a probe, a dead end: `handover.vacate`
    number = descriptor_of(conn)
    register(conn, number)
    return number


def owns_descriptor(conn: PooledConnection) -> bool:
    """Say whether libpq's descriptor is what it was: else nothing may be written to it, nor may it be closed."""
    if not conn.sharedpool_known:
        return True  # just made
    number = socket_of_failed(conn)
    return number is None or number < 0 or is_still(number, conn.sharedpool_known)


def keep_forever(conn: PooledConnection) -> None:
    """Keep a connection object for ever: at its end libpq writes to its descriptor's number, and closes that."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(conn))


def disown(conn: PooledConnection) -> None:
    """In a forked child: make an inherited connection harmless. The parent's session neither ends nor is used here."""
    closed_flag.reopen(conn)
    if conn.sharedpool_witness < 0 or conn.closed:
        return
    # Another thread of the parent may have been closing it: the number may be somebody else's by now.
    if owns_descriptor(conn):
        fd = socket_of(conn)
        try:
            replace_socket(conn)
        except OSError:
            os.close(fd)
    close_witness(conn)

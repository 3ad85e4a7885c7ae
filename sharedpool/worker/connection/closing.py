"""End sessions, and see that their backends exit.

The end is seen on the *witness*, the connection's duplicate of its socket (`opening.py`). It proves
the backend's end only if no proxy is in between (`postgres/route.py`). Behind a proxy the broker
asks the server.

A descriptor is known by its number, and other code may close it so that its number comes to mean
something else. Before each use the number is compared with what it was (`descriptors/owned.py`).
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

# A backend exits within milliseconds of its client's close, unless it is executing a query.
CLOSE_LIMIT_S = 1.0
CUT_LIMIT_S = 0.2
# Shows without a read that the other end is closed. 0 where poll cannot tell (macOS).
PEER_CLOSED: int = getattr(select, "POLLRDHUP", 0)


def close_confirmed(conns: Iterable[PooledConnection], limit_s: float = CLOSE_LIMIT_S) -> None:
    """Close connections and wait, `limit_s` seconds for all, until their backends have exited.

    A connection that another thread is using is cut, since psycopg2's close would wait for that
    thread's statement.

    Afterwards `conn.sharedpool_gone` tells whether the backend was seen to exit, and
    `conn.sharedpool_peer_closed` whether the other side has closed the connection. Behind a proxy
    neither is seen or waited for.
    """
    closing = [(conn, take_witness(conn)) for conn in conns]
    try:
        for conn, _ in closing:
            abandon(conn)
        _end_sessions(closing, limit_s)
    finally:
        _close(closing)


def cut(conns: Iterable[PooledConnection], limit_s: float = CUT_LIMIT_S) -> None:
    """End sessions that other threads may be using, without waiting for those threads.

    An idle backend exits within `limit_s` (see `sharedpool_gone`). One that executes a query has
    lost its client, and its thread gets an error when the query ends. The broker ends it, or the
    server when it next checks its client. A connection that another thread is closing is left to
    that thread.

    Only the sending half of the socket is shut down. To shut down the other half too would wake the
    query's thread at once. But on the broker's duplicate of the socket it would look like the
    backend's end.
    """
    cutting = [(conn, take_witness(conn)) for conn in conns]
    try:
        _end_sessions(cutting, limit_s)
    finally:
        _close(cutting)


def take_witness(conn: PooledConnection) -> Owned | None:
    """Take the witness off a connection; None if another thread has it, or its number is reused."""
    # Once the witness is closed, its number may go to a new socket. That may even be one of the
    # same backend, when a session comes back to this process.
    _numbers.pop(conn.sharedpool_witness, None)
    if not is_still(conn.sharedpool_witness, conn.sharedpool_known):
        conn.__dict__.pop("sharedpool_witness", None)
        return None
    try:
        # One line, so that no interrupt leaves the descriptor without an owner.
        return Owned(fileno=conn.__dict__.pop("sharedpool_witness"))
    except KeyError:
        return None


def descriptor_of(conn: PooledConnection) -> int:
    """Return the number of libpq's descriptor, which is the same as long as the object lives."""
    if conn.sharedpool_number < 0:
        conn.sharedpool_number = socket_of(conn)
    return conn.sharedpool_number


class _Holder(weakref.ref["PooledConnection"]):
    """A reference to a connection with a descriptor.

    A class of its own tells it from users' references.
    """


# The connection of each descriptor, libpq's or the witness, by number. The link's thread closes
# those that are left over (`close_ownerless`): an interrupt may end a finalizer, which is not
# called again, and psycopg2 does not close the socket of a connection that is SHUT
# (`closed_flag.py`).
_numbers: dict[int, tuple[_Holder, tuple[Identity, ...]]] = {}
# The entries of `_numbers` whose connection is gone, and since when that is known.
_ownerless: dict[int, tuple[object, float]] = {}
FINALIZING_S = 0.1  # no finalizer takes longer, unless it was interrupted


def register(conn: PooledConnection, number: int) -> None:
    """Have a connection's descriptor closed some time after its end, if it is open still."""
    _numbers[number] = _Holder(conn), conn.sharedpool_known


def is_referred_to(conn: PooledConnection) -> bool:
    """Return True if there are weak references to a connection besides this module's own."""
    entry = _numbers.get(conn.sharedpool_number)
    if entry is not None and weakref.getweakrefcount(conn) == 1 and entry[0]() is conn:
        return False
    return not set(map(type, weakref.getweakrefs(conn))) <= {_Holder}


def unregister(number: int) -> None:
    """Stop watching a descriptor.

    Once it is closed, its number may go to another descriptor of the same socket, since sessions
    come back to a process.
    """
    _numbers.pop(number, None)


def unregister_all(conn: PooledConnection) -> None:
    """Stop watching a connection's descriptors.

    The connection is kept forever, or psycopg2 is about to close them.
    """
    unregister(conn.sharedpool_witness)
    unregister(socket_of_failed(conn) or -1)


def close_ownerless() -> bool:
    """Close descriptors whose connections ended at least `FINALIZING_S` ago, at each heartbeat.

    Return True if there are more, to be closed by a later call.
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
    """Shut down sessions by their sockets, and record which of them the other side closes in time.

    A socket that has failed on this side proves nothing: its backend may live on, and the broker
    has to end it.
    """
    waiting: dict[int, PooledConnection] = {}
    poller = greenlets.poller()
    for conn, sock in conns:
        witness = -1 if sock is None else sock if isinstance(sock, int) else sock.fileno()
        if witness >= 0:
            # libpq has said goodbye if it could, but not for a session that it had given up.
            _shut(witness)
            if conn.sharedpool_direct is not False:
                poller.register(witness, PEER_CLOSED or select.POLLIN)
                waiting[witness] = conn
    deadline = time.monotonic() + limit_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in greenlets.wait(poller, left):
            peer_closed = other_side_closed(fd) if PEER_CLOSED else _read_to_end(waiting[fd], fd)
            if peer_closed is not None:
                poller.unregister(fd)
                conn = waiting.pop(fd)
                conn.sharedpool_peer_closed = peer_closed
                conn.sharedpool_gone = peer_closed and conn.sharedpool_direct is True


def end_session(
    conn: PooledConnection, witness: Owned | int | None, limit_s: float = CLOSE_LIMIT_S
) -> None:
    """End a session by its witness alone, and set `sharedpool_gone`.

    The caller keeps the descriptor.
    """
    _end_sessions([(conn, witness)], limit_s)


def abandon(shell: PooledConnection) -> None:
    """Close a connection object.

    If another thread is executing a statement on it, that thread drops it.
    """
    closed_flag.mark_broken(shell)
    if not closed_flag.is_busy(shell):
        shell.sharedpool_close()


def abort(conn: PooledConnection) -> None:
    """Close a connection without a witness, as no descriptor is free; set `sharedpool_gone`."""
    _end_sessions([(conn, conn.fileno())], CLOSE_LIMIT_S)
    conn.sharedpool_close()


def _read_to_end(conn: PooledConnection, witness: int) -> bool | None:
    """Read what is left on a witness, where poll cannot show the end of a stream (macOS).

    Return None if the stream has not ended, else whether the other side has ended it.
    """
    if not closed_flag.is_closed_for_good(conn):
        return None  # another thread's libpq is reading from it
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
        pass  # the other side has closed it already


def _close(conns: Iterable[tuple[PooledConnection, Owned | None]]) -> None:
    for conn, witness in conns:
        if witness is not None:
            close_if_ours(witness, conn.sharedpool_known)


def close_witness(conn: PooledConnection) -> None:
    """Close a connection's witness, if it has one."""
    _close([(conn, take_witness(conn))])


_dead_socket: tuple[int, Identity] = (-1, NOTHING)


def dead_socket() -> tuple[int, Identity]:
    """Return a descriptor on which nothing can be sent, and its identity.

    Raise OSError if none is free.

    It is made before it is needed, because after a fork no descriptor may be free. It is made anew
    if its number belongs to something else by now.
    """
    global _dead_socket
    if not is_still(_dead_socket[0], _dead_socket[1:]):
        ours, theirs = socket.socketpair()
        theirs.close()
        known = identity(ours.fileno())
        _dead_socket = (ours.detach(), known)
    return _dead_socket


def replace_socket(conn: PooledConnection) -> None:
    """Replace a connection's socket, so that not even its close reaches the session.

    Raise OSError if no replacement can be had.
    """
    number, known = dead_socket()
    os.dup2(number, expect_descriptor(conn, known), inheritable=False)


def expect_descriptor(conn: PooledConnection, known: Identity) -> int:
    """Record what libpq's descriptor will be from now on, and return its number.

    Until it is replaced, it may still be what it was before.
    """
    # Three in all: a session, a probe and a dead socket follow each other in `handover.vacate`.
    conn.sharedpool_known = (*conn.sharedpool_known[-2:], known)
    number = descriptor_of(conn)
    register(conn, number)
    return number


def owns_descriptor(conn: PooledConnection) -> bool:
    """Return True if libpq's descriptor is what it was.

    Else it may be neither written to nor closed.
    """
    if not conn.sharedpool_known:
        return True  # just made
    number = socket_of_failed(conn)
    return number is None or number < 0 or is_still(number, conn.sharedpool_known)


def keep_forever(conn: PooledConnection) -> None:
    """Keep a connection object forever.

    Its finalizer would write to, and close, a descriptor that is not its own any more.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(conn))


def disown(conn: PooledConnection) -> None:
    """Make an inherited connection harmless in a forked child. The parent's session goes on."""
    closed_flag.reopen(conn)
    if conn.sharedpool_witness < 0 or conn.closed:
        return
    # Another thread of the parent may have been closing it, so its number may be reused by now.
    if owns_descriptor(conn):
        fd = socket_of(conn)
        try:
            replace_socket(conn)
        except OSError:
            os.close(fd)
    close_witness(conn)

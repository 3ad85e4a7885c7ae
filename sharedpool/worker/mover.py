"""The fast path of the lane: give one connection, take one connection, in one function each.

Where many processes share few connections, nearly every checkout waits in the lane, and nearly
every checkin gives there. Between two turns of a process tens of others have run, so every
function costs ten times what it does in a loop. Hence the long functions: they do what
`giving.py`, `receiving.py`, `connection/handover.py` and `lane/lane.py` do for the usual case, and
nothing else. In any other case they leave everything untouched, and the slow path is taken. Once
the reset is sent, the connection is given or ended.

How long a process keeps a connection here while others wait is decided in `Mover.give`. While the
broker passes connections on, `core/time_slice.py` decides that.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from typing import Any

import psycopg2

from sharedpool.descriptors.owned import NO_SIGNAL, Owned, identity, is_still
from sharedpool.descriptors.timer import Timer
from sharedpool.lane.lane import Lane, MovingConnection
from sharedpool.lane.wait_sockets import AGAIN_S, WaitSocket, WaitSockets
from sharedpool.postgres import libpq
from sharedpool.postgres.peer_closed import borrow
from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker.connection import closed_flag, reset
from sharedpool.worker.connection.closing import unregister
from sharedpool.worker.connection.handover import (
    adopt,
    encoded_parameters,
    names_of_parameters,
    vacate,
)
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.reset import parameters_after
from sharedpool.worker.connection.wrapper import is_as_opened, is_wrapped
from sharedpool.worker.core.lease import Lease, collected
from sharedpool.worker.core.time_slice import STEADY_GAP_S
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.logs import logger

# After a connection was kept in vain, only a checkout within this time counts as steady use: two
# processes that take turns ask again soon, too, but one that is at work all the time does so at
# once.
_SURE_GAP_S = 0.0002

_USES = 3  # for which a time slice has room,
_LONGEST = 5  # unless they take longer than so many times `time_slice`

_IN_USE, _IDLE, _CLOSING, _SHARED = Phase.IN_USE, Phase.IDLE, Phase.CLOSING, ReleaseReason.SHARED


class Call:
    """One checkout under way. Its wait socket refers to it weakly, and is taken back without it."""


class Mover:
    """A pool's fast path in the lane that it has entered."""

    def __init__(
        self, local: LocalPool, wait_sockets: WaitSockets, lane: Lane, timer: Timer | None
    ) -> None:
        """`timer` wakes the link's thread to give connections that were kept in vain.

        Without a timer no connection is kept.
        """
        self._local = local
        self._wait_sockets = wait_sockets
        self._lane = lane
        self._board = lane.board
        self._cache = local.cache
        self._reset = reset.query(local.config.reset_command)
        library = libpq.library()
        self._status: Callable[[int | None, bytes], bytes | None] | None = None
        if library is not None:
            self._status = library.PQparameterStatus
        self._from_shelf = False  # the last connection came from the shelf, so look there first
        self._timer = timer
        self._slice_s = 0.0 if timer is None else local.config.time_slice
        self._gap_s = STEADY_GAP_S  # a thread that asks again within this time has a time slice
        self._parted_at = -math.inf  # when a connection was given last

    # --- giving

    def give(self, lease: Lease, conn: PooledConnection, now: float) -> bool:
        """Give a connection that was checked in to the first waiter, or put it on the shelf.

        The caller has taken the lease off it. In order:
        1. Within its time slice, where its process asks again at once: keep it, idle.
        2. If anything is unusual, return False, with nothing done: the slow path is taken.
        3. Send the reset, detach the session and give it (`_send`).
        """
        cache, board = self._cache, self._board
        held_s = now - lease.arrived_at
        if (
            lease.idle_s < self._gap_s
            and self._timer is not None
            # A move costs as much on a slow or busy machine as some uses there. So a slice has room
            # for some, unless they are so long that a move costs little in comparison.
            and (held_s < self._slice_s or held_s < _USES * (now - lease.since))
            and held_s < _LONGEST * self._slice_s
        ):
            if lease.since > lease.arrived_at:
                self._gap_s = STEADY_GAP_S  # the kept connection was used again
            # Armed before the connection is idle, in case it is not asked for again. The timer is
            # not postponed while another kept connection waits for it.
            self._timer.arm(self._slice_s + STEADY_GAP_S, anew=not cache.idle)
            lease.conn, lease.phase, lease.since = conn, _IDLE, now
            cache.idle.append(lease)
            self.check_kept_later()  # the timer may have fired before the append
            return True
        if (
            lease.cancelled
            or not (lease.deposited and lease.movable)
            or cache.waiting
            or now >= lease.retire_at
        ):
            return False
        if (
            cache.leases.get(lease.token) is not lease
            or lease.generation != board.generation
            or self._status is None
        ):
            return False
        cell = lease.cell = board.find(lease.token, lease.cell)
        names, known = conn.sharedpool_names, conn.sharedpool_known
        if cell < 0 or names is None or lease.backend is None or closed_flag.is_locked(conn):
            return False
        if self._timer is not None and not cache.idle:
            self._timer.disarm()
        parameters = encoded_parameters(
            tuple(map(self._status, itertools.repeat(conn.pgconn_ptr), names_of_parameters))
        )
        if parameters != conn.sharedpool_made_with:
            return False
        number = conn.sharedpool_number
        if not (is_still(number, known) and is_still(conn.sharedpool_witness, known)):
            return False
        live = lease.live
        if live is None or live.left_ms is not None or live.generation != lease.generation:
            left_ms = None if lease.retire_at == math.inf else int((lease.retire_at - now) * 1000)
            live = Live(lease.backend, lease.generation, parameters, left_ms, names)
        used_s = now - lease.since
        lease.phase, lease.since, lease.conn = _CLOSING, now, None
        try:
            self._send(
                lease,
                conn,
                borrow(number),
                MovingConnection(lease.token, cell, live, conn.sharedpool_witness),
            )
        except BaseException:
            lease.conn = conn  # interrupted: the link closes it
            raise
        if lease.timed:
            with self._local.lock:
                out = sum(
                    each.phase is _IN_USE and each.conn is None for each in cache.leases.values()
                )
                cache.timings.checked_in(used_s, cache.hits, out, typical=True)
        return True

    def note_kept_in_vain(self) -> None:
        """Record that a kept connection was not asked for again: from now on keep more rarely."""
        self._gap_s = _SURE_GAP_S

    def check_kept_later(self) -> None:
        """Have the link's thread look at the kept connections a moment later."""
        if self._timer is not None:
            self._timer.arm(STEADY_GAP_S)

    def _send(
        self, lease: Lease, conn: PooledConnection, sock: Any, item: MovingConnection
    ) -> None:
        local = self._local
        unregister(item.fd)
        # Taken first: after an interrupt the link closes `conn`, and with the witness still there
        # would end the session that another process may have by then.
        # One line, so that an interrupt finds the descriptor with an owner.
        witness = Owned(-1, -1, -1, conn.__dict__.pop("sharedpool_witness"))
        try:
            sent = sock.send(self._reset, NO_SIGNAL) == len(self._reset)
        except OSError:
            sent = False
        fit = vacate(conn) and sent
        if not (fit and self._lane.give(item)):
            local.giver.give_to_broker(lease, conn, item.live, witness, fit=fit)
            return
        witness.close()
        self._parted_at = lease.since
        # By now the session may be back, in another thread's hands, under another lease object.
        with local.lock:
            self._cache.given(lease)
        lease.ref = None
        local.given += 1
        local.released[_SHARED] += 1
        local.shells.keep(conn, item.live.parameters)
        if local.retired or local.disposed:
            local.wake_link()  # this may have been the last lease

    # --- taking

    def take(self, wait_s: float, began: float) -> PooledConnection | None:
        """Wait in the lane for a connection, and return it checked out.

        Return None if anything is unusual, or if the time is over: the slow path is taken.
        """
        local, wait_sockets = self._local, self._wait_sockets
        if (
            not (local.receiver.works and local.shells.are_known)
            or local.dropped
            or local.reclaim_lock.locked
        ):
            return None
        if not wait_s or logger.is_kept or local.config.configure is not None or is_wrapped():
            return None
        call = Call()
        wait_socket = wait_sockets.take(weakref.ref(call))
        if wait_socket is None:
            return None
        try:
            return self._wait(wait_socket, began + wait_s, began)
        finally:
            wait_sockets.give_back(wait_socket)

    def _wait(
        self, wait_socket: WaitSocket, deadline: float, began: float
    ) -> PooledConnection | None:
        board, local = self._board, self._local
        got, again_at, now, request = None, -math.inf, began, 0
        if self._from_shelf:
            got = wait_socket.take_from_shelf()
        while True:
            if got is None:
                self._from_shelf = False
                if now >= deadline or not (board.moving and self._lane.open) or local.disposed:
                    return None
                if now >= again_at:
                    # The same request, if there was one: so the thread keeps its place in the
                    # queue.
                    request = request or self._cache.waiters.new_request()
                    again_at = now + wait_socket.join_queue(request)
                    # A giver that saw no ticket has put its connection on the shelf.
                    if (got := wait_socket.take_from_shelf()) is not None:
                        self._from_shelf = True
                        continue
                got = wait_socket.wait(min(deadline - now, again_at - now, AGAIN_S))
            now = monotonic()
            if got is not None and got[0].passed is not None:
                self._receive_from_broker(got, deadline - now)
                got, wait_socket.busy = None, False
            if got is not None:
                if (conn := self._adopt(*got, began, now, deadline - now)) is not None:
                    return conn
                got, wait_socket.busy = None, False

    def _receive_from_broker(self, got: tuple[Moved, Owned], limit_s: float) -> None:
        """Receive a connection that the broker sent to an earlier waiter here: for any waiter."""
        local = self._local
        if (waiter := local.receiver.receive(*got, limit_s)) is not None:
            waiter.wake()
        elif (lease := self._cache.leases.get(got[0].token)) is not None:
            local.after_fast_checkin(lease, monotonic())

    def _adopt(
        self, moved: Moved, sock: Owned, began: float, now: float, limit_s: float
    ) -> PooledConnection | None:
        """Make a connection that has arrived this process's own, and lend it.

        Return None if it cannot be used: it is closed, and the broker told.
        """
        local, cache, live = self._local, self._cache, moved.live
        arriving = sock.fileno(), identity(sock.fileno())
        local.receiver.arriving.add(arriving)  # a child that is forked meanwhile closes it
        # The broker may ask for this lease meanwhile.
        cache.arriving[moved.token] = moved, weakref.ref(sock)
        try:
            if parameters_after(sock, live.parameters, limit_s) is not live.parameters:
                raise psycopg2.OperationalError("the reset's answer was unusual")
            conn = adopt(local.shells.take(live, len(cache.leases) + 1), sock, live)
            if not is_as_opened(conn):
                raise psycopg2.OperationalError("the connection must be wrapped")
            conn.sharedpool_local, conn.sharedpool_movable = local, True
            lease = Lease(moved.token, None, now)
            lease.idle_s = began - self._parted_at
            lease.cache, lease.backend, lease.live = cache, live.backend, live
            lease.generation = live.generation
            lease.cell, lease.moves = moved.cell, moved.moves
            lease.deposited = lease.movable = True
            if live.left_ms is not None:
                lease.retire_at = now + live.left_ms / 1000
                cache.note_retirement(lease.retire_at)
            lease.fast_checkout_until = lease.retire_at
            lease.phase, lease.thread = _IN_USE, get_ident()
            lease.ref = weakref.ref(conn, collected)
            lease.timed = cache.timings.choose(now)
            cache.timings.checked_out(now - began)
            local.adopted += 1
            conn.sharedpool_closed_flag = closed_flag.OPEN
            # Last, so that an interrupt before finds nothing, and one after finds a complete
            # lease. Under the lock, because a giver of this process may not have removed its own
            # lease of that name.
            with local.lock:
                cache.leases[moved.token] = lease
            conn.sharedpool_lent = lease
            return conn
        except BaseException as error:
            sock.close()  # unless the shell has it
            if cache.leases.get(moved.token) is None:
                local.refuse(moved)
            if not isinstance(error, psycopg2.Error | OSError):
                raise
            return None
        finally:
            local.receiver.arriving.discard(arriving)
            cache.arriving.pop(moved.token, None)

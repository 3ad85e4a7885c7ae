"""All that one process holds of a pool: cache, lock, line to the broker, and the I/O for what the cache decides.

A forked child gets new local pool; the parent's stay the parent's. The lock is held for bookkeeping only, never across
I/O or a user's callback.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Protocol, cast

import psycopg2
from msgspec import structs
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from sharedpool.descriptors.available import FOR_A_CONTEXT, is_shortage, require
from sharedpool.descriptors.owned import Identity, Owned, close_if_ours, identity, is_still
from sharedpool.descriptors.timer import Timer
from sharedpool.errors import SharedPoolError
from sharedpool.lane.lane import DESCRIPTORS, FOR_A_LANE, Item, Lane, network
from sharedpool.lane.wait_sockets import WaitSocket, WaitSockets
from sharedpool.wire.codec import encode
from sharedpool.wire.desk import GIVE_BYTES, Give, LaneInvitation, Live, Moved
from sharedpool.wire.messages import CancelQuery, ReleaseReason
from sharedpool.wire.values import Backend, Token
from sharedpool.worker import forks
from sharedpool.worker.connection import closed_flag
from sharedpool.worker.connection.closing import (
    close_confirmed,
    cut,
    dead_socket,
    disown,
    end_session,
    take_witness,
)
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.diagnosis import Diagnosis, Failure
from sharedpool.worker.connection.handover import (
    PATIENT_S,
    SUPPORTED,
    adopt,
    prepare,
    reads_dates,
    vacate,
    works,
)
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.reset import parameters_after
from sharedpool.worker.connection.shells import Shells
from sharedpool.worker.connection.state import (
    CHECK_AFTER_S,
    clean,
    is_unused,
    peer_has_closed,
    sync_transaction_status,
    turned_read_only,
)
from sharedpool.worker.connection.wrapper import as_user_sees
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import NOTHING_MOVES, Cache
from sharedpool.worker.core.lease import CLOSING_LIMIT_S, Closing, Lease, Waiter
from sharedpool.worker.core.time_slice import STEADY_GAP_S
from sharedpool.worker.link import links
from sharedpool.worker.link.link import Link
from sharedpool.worker.link.registration import Endpoint, Registration
from sharedpool.worker.location import BrokerLocation
from sharedpool.worker.logs import logger
from sharedpool.worker.recoverable_lock import RecoverableLock
from sharedpool.worker.settings import Callback, PoolConfig

READ_ONLY = "25006"
# SQLSTATEs by which a server says that it is read-only, goes down, or has just come up.
FAILOVER = frozenset({READ_ONLY, "57P01", "57P02", "57P03"})
# Connections that others want: they may go on, in another process.
_ASKED_FOR = (ReleaseReason.TAKEN, ReleaseReason.RETURN_DUE, ReleaseReason.SHARED)
# A hand-over that fails so often before it has worked once is not tried again: a slow server may spoil one trial.
_TRIALS = 3
_LOGS_LIMIT_S = 1.0
# So long the link's thread, which keeps the heartbeat, waits for the reset of one that nobody is there for any more.
_LINKS_LIMIT_S = 0.05
BROKEN = 2  # psycopg2's `closed` of a connection that an error ended


class LaneMover(Protocol):
    """What gives and takes connections in the pool's lane (`mover.py`)."""

    def give(self, lease: Lease, conn: PooledConnection, now: float) -> bool:
        """Give a connection that was checked in; return False when it is to go the slow path."""

    def take(self, wait_s: float, began: float) -> PooledConnection | None:
        """Wait for a connection; return it, checked out, or None when the slow path is to be gone."""

    def note_kept_in_vain(self) -> None:
        """Note that what was kept was not asked for again."""

    def check_kept_later(self) -> None:
        """Have the link's thread look at what is kept, a while later."""


class LocalPool:
    """One process's part of a pool.."""

    def __init__(
        self,
        config: PoolConfig,
        broker: BrokerLocation,
        make_session: Callable[[LocalPool], Endpoint],
        make_mover: Callable[[LocalPool, WaitSockets, Lane, Timer | None], LaneMover],
    ) -> None:
        self.config = config
        self.pid = os.getpid()
        self.lock = (
            threading.RLock()
        )  # only so that a finalizer can tell that its own thread holds it
        self.cache = Cache(config.expiration)
        self.messages = BrokerMessages(self.cache)
        self.cache.keep_idle = self.cache.hand_on = not config.disable_pooling
        self.keys: dict[Hashable, Lease] = {}
        self.orphans: deque[PooledConnection] = deque()
        self.limit = config.max_conn
        self.disposed = self.retired = False
        # Where nothing may go on between two uses of the pool: no thread, no connection.
        self.transient = forks.is_before_uwsgis_forks()
        if self.transient:
            self.cache.stop_keeping()
        self.before_fork = False  # the process is about to fork
        # Open while a checkout or checkin may go the fast path: see `Pool.get_conn`.
        self.fast_path = forks.ForkSafeFlag()
        self.hits = self.connects = self.handed_on = self.given = self.adopted = self.discarded = (
            self.errors
        ) = 0
        self.released: dict[ReleaseReason, int] = dict.fromkeys(ReleaseReason, 0)
        self.link: Link | None = None  # set and taken away together with `registration`
        self.registration: Registration | None = None
        # Sockets on their way in, each in a thread of its own: the reset of its session may be under way.
        self.arriving: set[tuple[int, Identity]] = set()
        self._latest: tuple[Link, Registration] | None = (
            None  # which may have left, and not ended yet
        )
        self.hands_over = False  # the broker passes connections on, and this process takes them
        self.diagnosis = Diagnosis()
        self.shells = Shells(config.conninfo.python_kwargs)
        self.handover_enabled = (
            config.handover and not config.disable_pooling and SUPPORTED
        )  # until it is found not to work
        self.handover_works, self._trials = False, _TRIALS  # whether it was found to work here
        self.tag = f"sharedpool {config.name}"  # until the broker has said its own
        self.invitation: LaneInvitation | None = (
            None  # to the pool's lane, while the broker's WELCOME is on its way
        )
        self._invited_with: list[int] = []
        self.wait_sockets: WaitSockets | None = None  # in the pool's lane
        self._left: list[
            WaitSocket
        ] = []  # of former lanes, where a thread may still have something
        self.mover: LaneMover | None = None
        self.reclaim_lock = RecoverableLock()  # across I/O; a user's reset() may come back to it
        with contextlib.suppress(OSError):  # it is made when it is needed, then
            dead_socket()
        self._broker = broker
        self._make_session, self._make_mover = make_session, make_mover
        self._address = ""  # of the broker, once it was first needed

    # --- I/O for the cache's decisions

    def check_in(self, lease: Lease, conn: PooledConnection, verdict: ReleaseReason | None) -> None:
        """Check a connection in: clean it, reset it, then cache, hand on or close it; scavenge.

        Raise what `reset` raised, after everything is in order.
        """
        closed_flag.reopen(conn)
        used_s, lent = time.monotonic() - lease.since, lease.conn is None
        typical = (
            used_s <= CHECK_AFTER_S and conn.get_transaction_status() == TRANSACTION_STATUS_IDLE
        )
        used = (used_s, typical) if lent else None
        try:
            if verdict is None:
                verdict = self._clean_for_next_user(lease, conn, used_s)
        except BaseException:
            # No variable refers to it: it refers to this frame, and in a cycle a connection that the next interrupt
            # makes lost would not be noticed before garbage is collected.
            self._file(lease, conn, ReleaseReason.BROKEN, used)
            raise
        self._file(lease, conn, verdict, used)

    def _clean_for_next_user(
        self, lease: Lease, conn: PooledConnection, used_s: float
    ) -> ReleaseReason | None:
        """Clean and reset a connection for its next user; return why it has to be closed, if it has to."""
        # A worker that was frozen brings back what was taken away, before its link has heard of that.
        if not clean(conn) or (used_s > CHECK_AFTER_S and peer_has_closed(conn)):
            if conn.closed == BROKEN:
                self.report_failover_sign(lease, "")
            return ReleaseReason.BROKEN
        if conn.sharedpool_erred and turned_read_only(conn):
            self.report_failover_sign(lease, READ_ONLY)
            return ReleaseReason.STALE
        if self.config.user_reset:
            self.config.user_reset(as_user_sees(conn))
            if not is_clean(self.config.name, "reset", conn):
                return ReleaseReason.BROKEN
        conn.sharedpool_closed_flag = closed_flag.SHUT
        return (
            None if is_unused(conn) else ReleaseReason.BROKEN
        )  # another thread has gone on with it meanwhile

    def _file(
        self,
        lease: Lease,
        conn: PooledConnection,
        verdict: ReleaseReason | None,
        used: tuple[float, bool] | None,
    ) -> None:
        """Cache a connection, hand it on or close it; scavenge. `used`: for how long it was lent, and if typically."""
        now = time.monotonic()
        closing: list[Closing] = []
        with self.lock:
            typical = True
            if lease.key is not None or lease.at_close is not None:
                if self.keys.get(lease.key) is lease:
                    del self.keys[lease.key]
                lease.key = lease.at_close = None
                lease.fast_checkin, typical = lease.generation == self.cache.generation, False
            if used is not None:
                self.cache.note_use(lease, used[0], now, typical=typical and used[1])
            outcome = self.cache.checkin(lease, conn, now, verdict)
            if self.cache.idle:
                closing = self.cache.expire(now)
        if outcome is not None:
            if isinstance(outcome, Closing):
                closing.append(outcome)
                self.discarded += outcome.reason is ReleaseReason.BROKEN
            else:
                outcome.wake()
            self.flush()
        if closing:
            self.close(closing)
        self.end_link_if_unused()

    def after_fast_checkin(self, lease: Lease, now: float) -> None:
        """See to a connection that was laid idle the fast path while others wait for one, or something has expired."""
        with self.lock:
            outcome = self.cache.reconsider_idle(lease, now)
            closing = self.cache.expire(now) if now >= self.cache.next_scavenge_at else []
        if isinstance(outcome, Closing):
            closing.append(outcome)
        elif outcome is not None:
            outcome.wake()
        if self.cache.outbox:
            self.wake_link()
        if closing:
            self.close(closing)

    def run_callback(
        self, callback: Callback, lease: Lease, conn: PooledConnection, name: str
    ) -> None:
        """Run a user's callback; one that raises, or leaves a transaction open, costs the connection."""
        try:
            callback(as_user_sees(conn))
            is_clean(self.config.name, name, conn)
        except BaseException:
            self.discarded += 1
            self.discard(lease, conn, ReleaseReason.BROKEN)
            raise

    def discard(self, lease: Lease, conn: PooledConnection, reason: ReleaseReason) -> None:
        """Close one connection and give its lease back."""
        with self.lock:
            closing = self.cache.close(lease, conn, reason, time.monotonic())
        self.close([closing])

    def close(self, closing: Iterable[Closing]) -> None:
        """Close connections, see them gone, give their leases back."""
        decided: list[tuple[Closing, PooledConnection]] = []
        for each in closing:
            conn = cast(PooledConnection, each.lease.conn)
            if not self._may_give(each, conn):
                if each.reason is not ReleaseReason.SHARED or not self._keep_after_all(
                    each.lease, conn
                ):
                    decided.append((each, conn))
            elif not self._give(each, conn):
                decided.append((each, conn))
        if not decided:
            return
        try:
            close_confirmed([conn for _, conn in decided])
        except BaseException:
            for each, _ in decided:  # interrupted: the link finishes it at its next heartbeat
                each.lease.since -= CLOSING_LIMIT_S
            raise
        with self.lock:
            for each, conn in decided:
                self.cache.closed(
                    each.lease,
                    each.reason,
                    gone=conn.sharedpool_gone,
                    closed=conn.sharedpool_closed,
                )
                self.released[each.reason] += 1
                if each.reason is ReleaseReason.RETURN_DUE:
                    self.cache.time_slice.note_given(time.monotonic())
        self.wake_link()

    def _may_give(self, closing: Closing, conn: PooledConnection) -> bool:
        """Say whether a connection that others want can be given to them."""
        lease = closing.lease
        if closing.reason not in _ASKED_FOR or not self.hands_over or not conn.sharedpool_movable:
            return False
        if not lease.deposited or lease.backend is None:
            return False
        if closing.reason is not ReleaseReason.SHARED:
            return True
        wait_sockets = self.wait_sockets
        if wait_sockets is None or not wait_sockets.lane.open or lease.cancelled:
            return False
        lease.cell = wait_sockets.lane.board.find(lease.token, lease.cell)
        return lease.cell >= 0 and lease.generation == wait_sockets.lane.board.generation

    def _keep_after_all(self, lease: Lease, conn: PooledConnection) -> bool:
        """Keep a connection that was to move and cannot; return False if it is to be closed."""
        with self.lock:
            laid = not self.disposed and self.cache.keep_after_all(lease, conn, time.monotonic())
        self.wake_link()
        return laid

    def _give(self, closing: Closing, conn: PooledConnection) -> bool:
        """Give a connection to another process, past the broker or to it; return whether that was done."""
        lease = closing.lease
        assert lease.backend is not None
        with self.lock:
            self.cache.giving(lease)
        try:
            parameters = prepare(conn, self.config.reset_command)
            if parameters is not None:
                self._give_away(closing, conn, lease.backend, parameters)
        except BaseException:
            lease.conn = conn  # interrupted: the link finishes it
            raise
        if parameters is None:
            lease.conn = conn
        return parameters is not None

    def _give_away(
        self, closing: Closing, conn: PooledConnection, backend: Backend, parameters: bytes
    ) -> None:
        """Take the session from under a connection and tell the broker; if it does not hear, end the session."""
        lease = closing.lease
        now = time.monotonic()
        left_ms = (
            None if lease.retire_at == math.inf else max(0, int((lease.retire_at - now) * 1000))
        )
        live = Live(backend, lease.generation, parameters, left_ms, conn.sharedpool_names or b"")
        witness = take_witness(
            conn
        )  # first: what finishes this after an interrupt must not end the session by it
        fit = vacate(conn)
        # From here on the broker's duplicate is the session's only socket: if it does not hear, it sees its end.
        if fit and (self._put_in_lane(closing, live, witness) or self._tell_broker(closing, live)):
            with self.lock:
                self.cache.given(lease)
                self.cache.time_slice.note_given(time.monotonic())
                self.released[closing.reason] += 1
                self.given += 1
            self.shells.keep(conn, parameters)
            if self.retired or self.disposed:
                self.wake_link()  # it may have been the last
        else:
            end_session(conn, witness)
            self.give_back(lease, closing.reason, gone=conn.sharedpool_gone)
        if witness is not None:
            close_if_ours(witness, conn.sharedpool_known)

    def _put_in_lane(self, closing: Closing, live: Live, witness: Owned | None) -> bool:
        """Give a connection in the lane, if that is how it is to go; return whether that was done."""
        wait_sockets, lease = self.wait_sockets, closing.lease
        if closing.reason is not ReleaseReason.SHARED or wait_sockets is None or witness is None:
            return False
        if wait_sockets.not_quiet:
            wait_sockets.receive_strays()
        return wait_sockets.lane.give(Item(lease.token, lease.cell, live, witness.fileno()))

    def give_kept(self) -> None:
        """Give what was kept for a slice of time, for a checkout that did not come. In the link's thread."""
        now = time.monotonic()
        for lease in list(self.cache.idle) if self.cache.moving[0] else ():
            if now - lease.since < STEADY_GAP_S:
                if self.mover is not None:
                    self.mover.check_kept_later()
                continue
            if self.mover is not None:
                self.mover.note_kept_in_vain()
            self.after_fast_checkin(lease, now)

    def give_in_lane(self, lease: Lease, conn: PooledConnection, now: float) -> bool:
        """Give a connection in the lane the fast path: see `mover.py`."""
        mover = self.mover
        return mover is not None and mover.give(lease, conn, now)

    def take_in_lane(self, timeout: float | None, began: float) -> PooledConnection | None:
        """Check a connection out that is given in the lane, the fast path: see `mover.py`."""
        if (mover := self.mover) is None:
            return None
        return mover.take(self.config.timeout if timeout is None else timeout, began)

    def give_to_broker(
        self, lease: Lease, conn: PooledConnection, live: Live, witness: Owned, *, fit: bool
    ) -> None:
        """Give a connection that is reset, and off its object, to the broker, if it is `fit`; else end its session."""
        closing = Closing(lease, ReleaseReason.SHARED)
        if fit and self._tell_broker(closing, live):
            with self.lock:
                self.cache.given(lease)
                self.given += 1
            self.shells.keep(conn, live.parameters)
        else:
            end_session(conn, witness)
            self.give_back(lease, ReleaseReason.SHARED, gone=conn.sharedpool_gone)
        close_if_ours(witness, conn.sharedpool_known)

    def keep_invitation(self, invitation: LaneInvitation | None, fds: list[int]) -> None:
        """Keep an invitation to a lane, and its descriptors, in place of a former one. In the link's thread."""
        former, self.invitation, self._invited_with = self._invited_with, invitation, fds
        for fd in former:
            os.close(fd)

    def enter_lane(self) -> bool:
        """Follow the invitation: wait and give in a lane from now on, whenever connections move in it.

        Return whether that can be. In the link's thread.
        """
        invitation, fds, self._invited_with = self.invitation, self._invited_with, []
        assert invitation is not None
        self.invitation = None
        try:
            require(FOR_A_LANE, f"pool {self.config.name!r}: its lane")
            fits = self.hands_over and invitation.network == network() and len(fds) == DESCRIPTORS
        except SharedPoolError:
            fits = False
        if not fits:
            for fd in fds:
                os.close(fd)
            return False
        try:
            lane = Lane(fds, invitation.number, self.refuse)
        except OSError as error:
            logger.info(
                "pool %r: no lane (%s): connections are not passed on here", self.config.name, error
            )
            return False
        self.leave_lane()
        self.wait_sockets = WaitSockets(lane, invitation.index, self._receive_stray)
        self.mover = self._make_mover(
            self, self.wait_sockets, lane, None if self.link is None else self.link.make_timer()
        )
        self.cache.moving = lane.board.head
        with self.lock:
            waiting = list(self.cache.waiting.values())
        for waiter in waiting:
            waiter.wake()  # to take a wait socket
        return True

    def leave_lane(self, *, former_brokers: bool = False) -> None:
        """Give no more in the lane. In the link's thread.

        What lies on the shelf of a `former_brokers` lane is taken, else nobody might, and what was sent to its wait
        sockets.
        """
        wait_sockets, self.wait_sockets, self.mover = self.wait_sockets, None, None
        self.cache.moving = NOTHING_MOVES
        self.cache.reporter.unread = []  # what it says would be said for ever
        if wait_sockets is None:
            return
        with self.lock:
            self.cache.waiters.leave_lane()
        wait_sockets.lane.leaving = True
        while former_brokers and (got := wait_sockets.lane.take_from_shelf()) is not None:
            self._receive_former_brokers(*got)
        wait_sockets.lane.close()
        for moved, sock in wait_sockets.drain() if former_brokers else ():
            self._receive_former_brokers(moved, sock)
        wait_sockets.close()
        self._left += wait_sockets.in_hand

    @property
    def unsure(self) -> bool:
        """Whether a thread may have received in a lane what is listed nowhere yet. In the link's thread."""
        self._left = [wait_socket for wait_socket in self._left if wait_socket.in_hand]
        return bool(self._left) or (self.wait_sockets is not None and self.wait_sockets.busy)

    def _receive_former_brokers(self, moved: Moved, sock: Owned) -> None:
        """Take in what came in a former broker's lane: its generation is as that of all that is held."""
        live = structs.replace(moved.live, generation=self.cache.generation)
        self._receive_stray(structs.replace(moved, live=live), sock)

    def _receive_stray(self, moved: Moved, sock: Owned) -> None:
        """Take in what came in the lane for a thread that waits no more, for whoever waits now."""
        waiter = self.receive(moved, sock, _LINKS_LIMIT_S)
        if waiter is not None:
            waiter.wake()
        elif (lease := self.cache.leases.get(moved.token)) is not None and self.cache.moving[0]:
            self.after_fast_checkin(lease, time.monotonic())

    def _tell_broker(self, closing: Closing, live: Live) -> bool:
        """Tell the broker of a connection that was taken from under its object; return whether it will hear."""
        link, registration = self.link, self.registration
        if link is None or registration is None:
            return False
        packet = encode(Give(registration.identity, closing.lease.token, closing.reason, live))
        return len(packet) <= GIVE_BYTES and link.desk.send(packet)

    def receive(self, moved: Moved, sock: Owned, limit_s: float) -> Waiter | None:
        """Take in a connection that was passed on: for the thread that asked, another that waits, or to lie idle.

        Return the waiter of the thread, to be woken. Waits for the end of its reset, at most `limit_s` seconds.
        """
        arriving = sock.fileno(), identity(sock.fileno())
        self.arriving.add(arriving)
        self.cache.arriving[moved.token] = (
            moved,
            weakref.ref(sock),
        )  # the broker may ask for it meanwhile
        try:
            return self._receive(moved, sock, limit_s)
        finally:
            self.arriving.discard(arriving)  # by now it is closed, or its lease tells of it
            self.cache.arriving.pop(moved.token, None)

    def _receive(self, moved: Moved, sock: Owned, limit_s: float) -> Waiter | None:
        live = moved.live
        if not self.shells.are_known and self.link is not None and self.link.is_here:
            sock.close()  # building the user's object would run his code in the link's thread
            self.refuse(moved)
            return None
        try:
            parameters = parameters_after(sock, live.parameters, limit_s)
            if parameters is None or not reads_dates(parameters):
                sock.close()
                self.refuse(moved)
                return None
            live = (
                live
                if parameters == live.parameters
                else structs.replace(live, parameters=parameters)
            )
            conn = adopt(self.shells.take(live, len(self.cache.leases) + 1), sock, live)
        except BaseException as error:
            sock.close()  # unless the shell has it
            self.refuse(moved)
            if isinstance(error, SharedPoolError) or is_shortage(error):
                logger.info(
                    "pool %r: a connection that was passed on is closed: %s",
                    self.config.name,
                    error,
                )
            elif isinstance(error, psycopg2.Error | OSError):
                self._disable_handover(str(error))
            else:
                raise
            return None
        fit = False
        try:
            trial = moved.passed is not None and moved.passed.trial
            fit = (self.handover_works and not trial) or self._is_fit(
                conn, moved.request, moved.token, trial=trial
            )
        finally:
            if not fit:
                cut([conn], limit_s=0)
                self.refuse(moved)
        if not fit:
            return None
        conn.sharedpool_local, conn.sharedpool_movable = self, True
        now = time.monotonic()
        try:
            with self.lock:
                retire_at = math.inf if live.left_ms is None else now + live.left_ms / 1000
                waiter = self.messages.received(moved, conn, retire_at, now)
        except SharedPoolError as error:
            logger.info("pool %r: %s", self.config.name, error)
            cut([conn], limit_s=0)
            self.refuse(moved)
            return None
        self.adopted += 1
        if waiter is None:
            self.wake_link()
        return waiter

    def _is_fit(self, conn: PooledConnection, request: int, token: Token, *, trial: bool) -> bool:
        """Say whether a connection that was passed can be used here. They are tried until one has worked."""
        cancel = trial and self._may_cancel(request)
        if self.handover_works and not cancel:
            return True
        fit = works(conn, partial(self.cancel_query, token, trial=True) if cancel else None)
        self.handover_works = self.handover_works or fit
        if not fit and not peer_has_closed(conn):
            self._trials -= 1
            if not self._trials:
                self._disable_handover(
                    "connections that are passed to it, or their cancels, do not work here"
                )
        return fit

    def _may_cancel(self, request: int) -> bool:
        """Say whether a cancel can be tried here and now, for who has made that request."""
        link, waiter = self.link, self.cache.waiting.get(request)
        if (
            link is None or link.is_here or waiter is None
        ):  # the link's thread is what sends a cancel
            return False
        return waiter.until is not None and waiter.until - time.monotonic() >= PATIENT_S

    def refuse(self, moved: Moved) -> None:
        """Have the broker end a connection that has come and is of no use here."""
        with self.lock:
            self.messages.refuse(moved, time.monotonic())
        self.wake_link()

    def _disable_handover(self, why: str) -> None:
        """Take part in the hand-over no longer."""
        if self.handover_enabled:
            text = "pool %r: no hand-over in this process (%s): connections are closed and opened instead"
            logger.warning(text, self.config.name, " ".join(why.split()))
        self.handover_enabled = self.hands_over = False

    def cancel_query(self, token: Token, *, trial: bool = False) -> None:
        """Have the broker cancel what a lease's connection is executing."""
        with self.lock:
            if (lease := self.cache.leases.get(token)) is not None:
                lease.cancelled = True
            self.cache.outbox.append(CancelQuery(token, trial))
        self.wake_link()

    def give_back(
        self, lease: Lease, reason: ReleaseReason, *, gone: bool = True, closed: bool = False
    ) -> None:
        """Give back a lease that has no connection here; `gone` False when one may be left on the server.

        `closed`: not if the other side is the server.
        """
        with self.lock:
            self.cache.closed(lease, reason, gone=gone, closed=closed)
        self.wake_link()

    def not_opened(self, lease: Lease, reason: ReleaseReason, failure: Failure) -> None:
        """Give back a lease for which no connection could be opened."""
        with self.lock:
            self.cache.closed(
                lease,
                reason,
                gone=failure.gone,
                closed=failure.closed,
                error=failure.error,
                code=failure.code,
                unreachable=failure.unreachable,
            )
        self.wake_link()

    def deposit(self, lease: Lease, conn: PooledConnection) -> None:
        """Hand in a duplicate of a connection's socket at the broker's desk, if that was not done."""
        link, registration = self.link, self.registration
        if not lease.deposited and link is not None and registration is not None:
            lease.deposited = link.desk.deposit(registration.identity, lease.token, conn)

    def report_failover_sign(self, lease: Lease, code: str) -> None:
        """Tell the broker that a connection saw the server fail over (SQLSTATE `code`), or was found dead ("")."""
        with self.lock:
            self.cache.report_failover_sign(lease, code)
        self.wake_link()

    def notice(self, conn: PooledConnection, error: BaseException) -> None:
        """Look whether what a user's statement raised tells that the server fails over."""
        code, lease = getattr(error, "pgcode", None), conn.sharedpool_lease
        if code in FAILOVER and lease is not None:
            self.report_failover_sign(lease, code)

    def reclaim(self, limit_s: float, *, thorough: bool = True) -> None:
        """Check in what its users dropped without a `put_conn`.

        When this returns, no other thread is at it either, unless `limit_s` seconds were too short for that. Not
        `thorough`: run no user's code and no rollback (the link must keep its heartbeat), close what would need them.
        """
        if not self.orphans and not self.reclaim_lock.locked:
            return
        hold = self.reclaim_lock.acquire(limit_s)
        if hold is None:
            return
        try:
            while self.orphans:
                conn = self.orphans.popleft()
                lease = take_lease(conn)
                if lease is None:
                    continue
                keep = (
                    not self.disposed
                    and not conn.sharedpool_finalized
                    and (thorough or self._needs_no_cleaning(conn))
                )
                try:
                    self.check_in(lease, conn, None if keep else ReleaseReason.CLOSED)
                except Exception:
                    logger.exception(
                        "pool %r: reset() failed for a connection its user dropped",
                        self.config.name,
                    )
        finally:
            hold.release()

    def _needs_no_cleaning(self, conn: PooledConnection) -> bool:
        return (
            self.config.user_reset is None
            and conn.get_transaction_status() == TRANSACTION_STATUS_IDLE
        )

    def purge(self) -> int:
        """Close what has been idle or has lived too long; return how many."""
        with self.lock:
            closing = self.cache.expire(time.monotonic())
        self.close(closing)
        return len(closing)

    def retire(self) -> None:
        """Keep nothing idle from now on; the link ends with the last lease."""
        self.fast_path.clear()
        with self.lock:
            self.retired = True
            self.cache.stop_keeping()
            closing = self.cache.take_all_idle(time.monotonic())
        self.close(closing)
        self.wake_link()

    def end_link_if_unused(self) -> None:
        """End the link, where nothing may go on, if nothing is held; blocks until that is done, at most 1.5 s."""
        if (
            self.transient
            and self._latest is not None
            and not (self.cache.leases or self.cache.waiting)
        ):
            link, registration = self._latest
            link.leave(registration)
            logger.flush(_LOGS_LIMIT_S)

    @property
    def busy(self) -> bool:
        """Whether a connection is in use, or waited for."""
        return len(self.cache.leases) > len(self.cache.idle) or bool(self.cache.waiting)

    def before_fork_begins(self) -> None:
        """Close what lies idle, and end the registration. Blocks until that is done, at most some seconds.

        With the last one the link's thread ends.
        """
        self.before_fork = True
        with self.lock:
            closing = self.cache.take_all_idle(time.monotonic())
        self.close(closing)
        link, registration = self.link, self.registration
        if link is not None and registration is not None:
            link.leave(registration)

    def after_fork_in_parent(self) -> None:
        """Go on, in the process that has forked."""
        self.before_fork = False

    def flush(self) -> None:
        """Have the link send what is in the outbox; its thread is left alone when that is empty."""
        if self.cache.outbox:
            self.wake_link()

    def wake_link(self) -> None:
        """Have the link look what there is to do."""
        link = self.link  # its own thread may take it away at any moment
        if link is not None:
            link.wake()

    def locate_broker(self) -> None:
        """Find out where the broker is, when that is first needed: by who this process runs as by then.

        May read files and make the runtime directory. Raise `ConfigError` when that is not possible.
        """
        if not self._address:
            self._address = self._broker.address()

    def ensure_link(self) -> tuple[Link, Registration]:
        """Return the link and the registration there, started. The lock is held; starting a thread is all this does.

        `locate_broker` was called before.
        """
        if self.link is None or self.registration is None:
            if not links.current().have(self._address):
                require(FOR_A_CONTEXT + 2, f"pool {self.config.name!r}: the line to the broker")
            address, broker = self._address, self._broker
            start = partial(broker.start, address) if broker.is_automatic else None
            self.link, self.registration = links.current().attach(
                address, self._make_session(self), self.cache.outbox, start
            )
            self._latest = self.link, self.registration
            forks.add_local_pool(self)
            forks.release_at_child_exit()
        self.link.ensure_running()  # an interrupt may have come between the two
        return self.link, self.registration

    def disown(self) -> None:
        """In a forked child: make every inherited connection harmless. Takes no lock: its holder is not here."""
        for number, known in self.arriving:
            if is_still(number, (known,)):
                os.close(number)  # the thread that has it is not here
        for lease in list(self.cache.leases.values()):
            conn = lease.conn or (lease.ref() if lease.ref else None)
            if conn is not None:
                disown(cast(PooledConnection, conn))
        if self.wait_sockets is not None:
            self.wait_sockets.lane.close()
            self.wait_sockets.disown()
        self.keep_invitation(None, [])
        if self.link is not None:
            self.link.disown()


def is_clean(pool: str, callback: str, conn: PooledConnection) -> bool:
    """Say whether a callback left the connection open; raise when it left a transaction open on it."""
    if conn.closed:
        return False
    if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
        raise psycopg2.ProgrammingError(
            f"pool {pool!r}: {callback}() left a transaction open on the connection: commit or roll back in it"
        )
    sync_transaction_status(conn)
    return True

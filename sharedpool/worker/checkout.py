"""Checkouts that the fast path of `pool.py` cannot serve.

Find a lease, replace a dead connection, connect, run `check`. On every way out, an exception in any
line included, the lease has exactly one owner: the cache, a waiter, or a connection object whose
loss is noticed.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import cast

from psycopg2.extensions import STATUS_READY, connection

from sharedpool.errors import PoolClosed
from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker import error_messages, greenlets
from sharedpool.worker.connection import closed_flag
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.state import CHECK_AFTER_S, has_no_input, is_unused
from sharedpool.worker.connection.wrapper import detach, has_lost_wrapper, wrap
from sharedpool.worker.core import callsite
from sharedpool.worker.core.lease import Lease, Waiter
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.logs import logger
from sharedpool.worker.opening import configure_received, open_connection, run_callback
from sharedpool.worker.waiting import ANSWER_LIMIT_S, Wait


def checkout(local: LocalPool, lease: Lease | None, wait_s: float, now: float) -> connection:
    """Return a connection, or its wrapper, that is ready for its user.

    It is that of the idle `lease`, or of one that is waited for. Raise what `Pool.get_conn` raises.
    """
    return Checkout(local, lease, wait_s, now).run()


class Checkout:
    """One checkout under way.

    Its waiter refers to it weakly. So what a checkout has taken is found even if an interrupt ends
    both the checkout and its clean-up (`Session.beat`).
    """

    def __init__(self, local: LocalPool, lease: Lease | None, wait_s: float, now: float) -> None:
        self._local = local
        self._lease = lease
        self._wait_s = wait_s
        self._began = now
        self._waiter = Waiter(_wake_nobody, now, self)

    def run(self) -> connection:
        """Return the connection, or leave nothing behind."""
        try:
            if not isinstance(self._wait_s, int | float) or not self._wait_s >= 0:
                raise ValueError(f"timeout: must be 0 or more seconds, not {self._wait_s!r}")
            self._deadline = self._began + self._wait_s
            lease, conn = self._find_lease()
            if conn is None:
                conn = open_connection(self._local, lease, self._deadline if self._wait_s else None)
            else:
                self._reuse(lease, conn)
            return self._lend(lease, conn)
        except BaseException:
            self._local.errors += 1
            self._abandon()
            raise

    # --- a lease

    def _find_lease(self) -> tuple[Lease, PooledConnection | None]:
        """Return a lease, with a connection that can be lent or without one."""
        if self._lease is None:
            self._lease = self._wait()
        while True:
            lease = self._lease
            lease.waiter = weakref.ref(self._waiter)  # it is this checkout's until its user has it
            conn = cast("PooledConnection | None", lease.conn)
            reason = self._reason_to_replace(lease, conn)
            if reason is None:
                return lease, conn
            # Nothing is connected again under the old lease: this process may have been frozen, and
            # the broker may have fenced the lease.
            self._give_up(lease, conn, reason)
            self._lease = self._wait()

    def _reason_to_replace(
        self, lease: Lease, conn: PooledConnection | None
    ) -> ReleaseReason | None:
        """Return why not to lend a connection, or not to connect for a lease; else None."""
        if conn is None:  # the grant may have been on its way, or this process frozen, for any time
            return ReleaseReason.UNUSED if time.monotonic() > lease.connect_by else None
        if self._began >= lease.retire_at:
            return ReleaseReason.RETIRED
        if lease.needs_configure and lease is self._waiter.lease:
            return None  # it has arrived this moment: no user has its object yet
        if closed_flag.is_closed_for_good(conn) or (
            lease.idle_s > CHECK_AFTER_S and not has_no_input(conn)
        ):
            return ReleaseReason.BROKEN
        # A former user may have gone on with it after the checkin.
        return None if is_unused(conn) else ReleaseReason.CLOSED

    def _give_up(self, lease: Lease, conn: PooledConnection | None, reason: ReleaseReason) -> None:
        local = self._local
        if conn is None:
            local.give_back(lease, reason)
            return
        local.discarded += 1
        if reason is ReleaseReason.BROKEN:
            local.report_failover_sign(lease, "")
        local.discard(lease, conn, reason)

    def _wait(self) -> Lease:
        """Wait for a lease: an idle one after all, another thread's or process's, or a grant."""
        local, waiter, wait_s = self._local, self._waiter, self._wait_s
        if logger.is_kept:  # a finalizer, for instance, which runs in whichever thread collects
            raise error_messages.in_the_link(local.config.name)
        if greenlets.is_eventlets():
            raise error_messages.unsupported(local.config.name)
        if local.dropped or local.reclaim_lock.locked:
            local.reclaim(min(wait_s, 1000.0) if wait_s else ANSWER_LIMIT_S)
        local.locate_broker()
        if (lease := Wait(local, waiter, wait_s, self._deadline).wait()) is not None:
            return lease
        if waiter.error is not None:
            raise waiter.error
        if waiter.denial is not None:
            raise error_messages.refused(local.config.name, waiter.denial, wait_s)
        if waiter.lease is None:
            raise AssertionError("bug: a waiter was woken without an outcome")
        return waiter.lease

    # --- a connection

    def _reuse(self, lease: Lease, conn: PooledConnection) -> None:
        """Make an open connection ready: one that was idle, or that came from elsewhere."""
        conn.sharedpool_closed_flag = closed_flag.OPEN
        if lease.needs_configure:
            configure_received(self._local, lease, conn)
        elif lease is self._waiter.lease:
            self._local.handed_on += 1
        else:
            self._local.hits += 1

    def _lend(self, lease: Lease, conn: PooledConnection) -> connection:
        """Run `check`, and make the connection its user's."""
        local = self._local
        wrapped = conn.sharedpool_wrapper_ref is not None
        if wrapped and has_lost_wrapper(conn):
            wrap(conn, local.config.conninfo)
        if local.config.check:
            run_callback(local, local.config.check, lease, conn, "check")
        if local.disposed:
            raise PoolClosed(f"pool {local.config.name!r} was disposed of meanwhile")
        with local.lock:
            lease.phase = Phase.IN_USE  # one that was handed on was still its giver's
            lease.thread, lease.since = threading.get_ident(), time.monotonic()
            local.cache.timings.checked_out(lease.since - self._began)
            if local.cache.timings.choose(lease.since) or conn.sharedpool_touched:
                lease.fast_checkin = False
        if local.config.debug_checkouts:
            lease.stack = callsite.capture()
        users = detach(conn) if wrapped or conn.sharedpool_wrapper is not None else conn
        conn.sharedpool_lent = lease
        self._waiter.lease = None
        # From here on the caller's reference is the only one. If an interrupt drops the connection,
        # its finalizer brings it back.
        lease.conn = None
        return users

    def _abandon(self) -> None:
        """Leave nothing behind of a checkout that failed or was interrupted."""
        local, lease = self._local, self._lease
        with local.lock:
            other = local.cache.give_up(self._waiter, time.monotonic())
        if other is not None:
            other.wake()
        local.wake_link()
        if lease is not None and lease.phase is Phase.IN_USE and lease.conn is not None:
            # It is open and was never lent.
            conn = cast(PooledConnection, lease.conn)
            take_lease(conn)
            # Without its settings it cannot be cleaned: opening it was interrupted.
            local.check_in(lease, conn, None if conn.sharedpool_session else ReleaseReason.CLOSED)
        local.end_link_if_unused()


def lend_wrapped(lease: Lease, conn: PooledConnection, now: float) -> connection | None:
    """Lend a wrapped connection by the fast path; return its wrapper, or None if it cannot be."""
    wrapper = conn.sharedpool_wrapper
    if wrapper is None or lease.needs_configure:
        return None
    if lease.idle_s > CHECK_AFTER_S or now >= lease.retire_at:
        return None
    if conn.status != STATUS_READY or conn.get_transaction_status():
        return None
    # The wrapper refers to the connection. Kept here, it would hide that its user has dropped both.
    conn.sharedpool_wrapper = None
    conn.sharedpool_closed_flag = closed_flag.OPEN
    conn.sharedpool_lent = lease
    lease.conn = None
    return cast(connection, wrapper)


def _wake_nobody() -> None:
    """Do nothing: no thread waits on this waiter yet."""

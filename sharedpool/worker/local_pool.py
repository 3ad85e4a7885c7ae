"""One process's part of a pool: check connections in, close or give them, and end.

The cache decides (`core/cache.py`), and `LocalPool` carries out: cleaning, closing, waking waiters.
Its parts are the state (`local_state.py`), giving (`giving.py`), receiving (`receiving.py`) and the
lane (`lane_membership.py`). `checkout.py` checks out. A forked child gets a `LocalPool` of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from sharedpool.descriptors.available import FOR_A_CONTEXT, require
from sharedpool.descriptors.owned import Owned, is_still
from sharedpool.descriptors.timer import Timer
from sharedpool.lane.lane import Lane
from sharedpool.lane.wait_sockets import WaitSockets
from sharedpool.wire.desk import Moved
from sharedpool.wire.messages import ReleaseReason
from sharedpool.worker import callbacks, forks
from sharedpool.worker.connection import closed_flag
from sharedpool.worker.connection.closing import close_confirmed, disown
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.state import (
    CHECK_AFTER_S,
    clean,
    is_unused,
    peer_has_closed,
    turned_read_only,
)
from sharedpool.worker.core.lease import CLOSING_LIMIT_S, Closing, Lease
from sharedpool.worker.core.time_slice import STEADY_GAP_S
from sharedpool.worker.giving import Giver
from sharedpool.worker.lane_membership import LaneMembership, LaneMover
from sharedpool.worker.link import links
from sharedpool.worker.link.link import Link
from sharedpool.worker.link.registration import Endpoint, Registration
from sharedpool.worker.local_state import READ_ONLY, LocalState
from sharedpool.worker.location import BrokerLocation
from sharedpool.worker.logs import logger
from sharedpool.worker.receiving import Receiver
from sharedpool.worker.settings import PoolConfig

_LOGS_LIMIT_S = 1.0
# How long the link's thread, which keeps the heartbeat, waits for a connection's reset.
_LINKS_LIMIT_S = 0.05


class LocalPool(LocalState):
    """A pool in one process: its state, and all I/O but checkouts."""

    def __init__(
        self,
        config: PoolConfig,
        broker: BrokerLocation,
        make_session: Callable[[LocalPool], Endpoint],
        make_mover: Callable[[LocalPool, WaitSockets, Lane, Timer | None], LaneMover],
    ) -> None:
        super().__init__(config)
        self.receiver = Receiver(self)
        self.membership = LaneMembership(self, self._receive_stray, partial(make_mover, self))
        self.giver = Giver(self, self.membership)
        self._broker = broker
        self._make_session = make_session
        self._address = ""  # the broker's, once it was needed
        # The last link and registration. After the pool has left them they may go on for a while.
        self._latest: tuple[Link, Registration] | None = None

    # --- checkin

    def check_in(self, lease: Lease, conn: PooledConnection, verdict: ReleaseReason | None) -> None:
        """Check in a connection: clean and reset it, then cache, hand on, give or close it.

        `verdict` is why it must be closed in any case. Also close the idle connections that have
        expired. An exception of `reset` is raised once all that is done.
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
            # The exception is bound to no name. It refers to this frame, so a name here would close
            # a cycle. A connection that the next interrupt loses in a cycle is not noticed before a
            # garbage collection.
            self._file(lease, conn, ReleaseReason.BROKEN, used)
            raise
        self._file(lease, conn, verdict, used)

    def _clean_for_next_user(
        self, lease: Lease, conn: PooledConnection, used_s: float
    ) -> ReleaseReason | None:
        """Clean and reset a connection for its next user; return why it must be closed, or None."""
        # After a long use the peer is looked at: the broker may have fenced this process while it
        # was frozen, and its message may not have been read yet.
        if not clean(conn) or (used_s > CHECK_AFTER_S and peer_has_closed(conn)):
            if conn.closed == closed_flag.BROKEN:
                self.report_failover_sign(lease, "")
            return ReleaseReason.BROKEN
        if conn.sharedpool_erred and turned_read_only(conn):
            self.report_failover_sign(lease, READ_ONLY)
            return ReleaseReason.STALE
        reset = self.config.user_reset
        if reset and not callbacks.run(self.config.name, "reset", reset, conn):
            return ReleaseReason.BROKEN
        conn.sharedpool_closed_flag = closed_flag.SHUT
        # Another thread may have begun a statement before the flag was shut.
        return None if is_unused(conn) else ReleaseReason.BROKEN

    def _file(
        self,
        lease: Lease,
        conn: PooledConnection,
        verdict: ReleaseReason | None,
        used: tuple[float, bool] | None,
    ) -> None:
        """Carry out what the cache decides on a checkin, and close what has expired.

        `used`: the seconds for which the connection was lent, and whether its use was typical.
        """
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

    def after_fast_checkin(self, lease: Lease, now: float, since: float | None = None) -> None:
        """Reconsider a connection that the fast path has laid idle, and close what has expired.

        Called when others wait, or when something has expired. `since` is when its last use began,
        if it may be given by the lane's fast path.
        """
        cache, conn = self.cache, None
        if (
            since is not None
            and cache.moving_flag[0]
            and cache.keep_idle  # else it may not lie idle for a time slice either
            and not cache.returns_due
            and (conn := cache.take_back(lease)) is not None
        ):
            lease.since = since
            if self.membership.give(lease, cast(PooledConnection, conn), now):
                return
        with self.lock:
            outcome = cache.reconsider_idle(lease, now, conn)
            closing = cache.expire(now) if now >= cache.next_scavenge_at else []
        if isinstance(outcome, Closing):
            closing.append(outcome)
        elif outcome is not None:
            outcome.wake()
        self.flush()
        if closing:
            self.close(closing)

    def reclaim(self, limit_s: float, *, thorough: bool = True) -> None:
        """Check in the connections that their users dropped without a `put_conn`.

        Wait at most `limit_s` seconds for another thread that is doing so. Not `thorough`: run no
        user's code and no rollback, because the link's thread must keep its heartbeat. A connection
        that would need either is closed.
        """
        if not self.dropped and not self.reclaim_lock.locked:
            return
        hold = self.reclaim_lock.acquire(limit_s)
        if hold is None:
            return
        try:
            while self.dropped:
                conn = self.dropped.popleft()
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
                    text = "pool %r: reset() failed for a connection that its user dropped"
                    logger.exception(text, self.config.name)
        finally:
            hold.release()

    def _needs_no_cleaning(self, conn: PooledConnection) -> bool:
        return (
            self.config.user_reset is None
            and conn.get_transaction_status() == TRANSACTION_STATUS_IDLE
        )

    # --- closing

    def discard(self, lease: Lease, conn: PooledConnection, reason: ReleaseReason) -> None:
        """Close one connection and give its lease back."""
        with self.lock:
            closing = self.cache.close(lease, conn, reason, time.monotonic())
        self.close([closing])

    def close(self, closing: Iterable[Closing]) -> None:
        """Close connections and give their leases back, or give the connections to other processes.

        Blocks until the backends of the closed ones are gone, as long as `close_confirmed` does.
        """
        decided = [
            (each, conn)
            for each in closing
            if not self._lives_on(each, conn := cast(PooledConnection, each.lease.conn))
        ]
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
                    peer_closed=conn.sharedpool_peer_closed,
                )
                self.released[each.reason] += 1
                if each.reason is ReleaseReason.RETURN_DUE:
                    self.cache.time_slice.note_given(time.monotonic())
        self.wake_link()

    def _lives_on(self, closing: Closing, conn: PooledConnection) -> bool:
        """Give a connection to another process, or keep it; return False if it must be closed."""
        if self.giver.may_give(closing, conn):
            return self.giver.give(closing, conn)
        if closing.reason is not ReleaseReason.SHARED:
            return False
        with self.lock:
            kept = not self.disposed and self.cache.keep_after_all(
                closing.lease, conn, time.monotonic()
            )
        self.wake_link()
        return kept

    def purge(self) -> int:
        """Close the connections that were idle too long or have lived too long; return how many."""
        with self.lock:
            closing = self.cache.expire(time.monotonic())
        self.close(closing)
        return len(closing)

    def close_idle(self) -> int:
        """Close all idle connections; return how many."""
        with self.lock:
            closing = self.cache.take_all_idle(time.monotonic())
        self.close(closing)
        return len(closing)

    # --- in the link's thread

    def give_kept(self) -> None:
        """Give the connections that were kept for a time slice, and not asked for again."""
        now, mover = time.monotonic(), self.membership.mover
        for lease in list(self.cache.idle) if self.cache.moving_flag[0] else ():
            if now - lease.since < STEADY_GAP_S:
                if mover is not None:
                    mover.check_kept_later()
                continue
            if mover is not None:
                mover.note_kept_in_vain()
            self.after_fast_checkin(lease, now)

    def _receive_stray(self, moved: Moved, sock: Owned) -> None:
        """Receive a connection for a thread that no longer waits: it goes to any waiter."""
        waiter = self.receiver.receive(moved, sock, _LINKS_LIMIT_S)
        if waiter is not None:
            waiter.wake()
        elif (lease := self.cache.leases.get(moved.token)) is not None and self.cache.moving_flag[
            0
        ]:
            self.after_fast_checkin(lease, time.monotonic())

    # --- the link

    def locate_broker(self) -> None:
        """Find the broker's address when it is first needed.

        It may depend on the user that this process runs as then. May read files and make the
        runtime directory. Raise `ConfigError` if that is not possible.
        """
        if not self._address:
            self._address = self._broker.address()

    def ensure_link(self) -> tuple[Link, Registration]:
        """Return the link, started, and this pool's registration there.

        The lock must be held; `locate_broker` comes first. Blocks for a thread's start only.
        """
        if self.link is None or self.registration is None:
            if not links.current().have(self._address):
                require(FOR_A_CONTEXT + 2, f"pool {self.config.name!r}: the link to the broker")
            address, broker = self._address, self._broker
            start = partial(broker.start, address) if broker.is_automatic else None
            self.link, self.registration = links.current().attach(
                address, self._make_session(self), self.cache.outbox, start
            )
            self._latest = self.link, self.registration
            forks.add_local_pool(self)
            forks.release_at_child_exit()
        self.link.ensure_running()  # also when an interrupt came between the two last time
        return self.link, self.registration

    def end_link_if_unused(self) -> None:
        """End the link of a transient pool that holds nothing; blocks at most 1.5 s."""
        if not self.transient or self._latest is None:
            return
        if not (self.cache.leases or self.cache.waiting):
            link, registration = self._latest
            link.leave(registration)
            logger.flush(_LOGS_LIMIT_S)

    # --- the end, and forks

    def retire(self) -> None:
        """Keep nothing idle from now on; the link ends with the last lease."""
        self.fast_path.clear()
        with self.lock:
            self.retired = True
            self.cache.stop_keeping()
        self.close_idle()
        self.wake_link()

    @property
    def busy(self) -> bool:
        """Whether a connection is in use or waited for."""
        return len(self.cache.leases) > len(self.cache.idle) or bool(self.cache.waiting)

    def before_fork_begins(self) -> None:
        """Close idle connections and end the registration; blocks for some seconds at most.

        The link's thread ends with the last registration.
        """
        self.before_fork = True
        self.close_idle()
        link, registration = self.link, self.registration
        if link is not None and registration is not None:
            link.leave(registration)

    def after_fork_in_parent(self) -> None:
        """Go on in the process that has forked."""
        self.before_fork = False

    def disown(self) -> None:
        """Make every inherited connection harmless, in a forked child.

        Takes no lock: the parent's thread that may hold it does not exist here.
        """
        for number, known in self.receiver.arriving:
            if is_still(number, (known,)):
                os.close(number)  # its thread does not exist here
        for lease in list(self.cache.leases.values()):
            conn = lease.conn or (lease.ref() if lease.ref else None)
            if conn is not None:
                disown(cast(PooledConnection, conn))
        self.membership.disown()
        if self.link is not None:
            self.link.disown()

"""The threads of a worker: what `local_pool.py` and `checkout.py` do around a real cache."""

from __future__ import annotations

from dataclasses import dataclass

from sharedpool.errors import SharedPoolError
from sharedpool.wire.messages import CancelQuery, ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker.connection.state import CHECK_AFTER_S
from sharedpool.worker.core.lease import Closing, Lease, Waiter
from tests.model.desk import Conn
from tests.model.moving import InTheLane
from tests.model.server import Proc


@dataclass(eq=False)
class Opening:
    """A thread inside `connect` or what follows."""

    lease: Lease
    proc: Proc
    conn: Conn | None = None  # once the socket was deposited


class Checkouts(InTheLane):
    """The part of a worker that its threads are: checkouts, connects, checkins."""

    pool: str
    tag: str
    opening: list[Opening]

    # --- threads: checkout

    def checkout(self, wait_s: float) -> None:
        waiter = Waiter(_nobody, self.world.now)
        if not self._from_cache() and not self.take_fast_path(waiter, wait_s):
            self.wait(waiter, wait_s)

    def take_slow_path(self, waiter: Waiter, deadline: float) -> None:
        if not self._from_cache():
            self.wait(waiter, max(0.001, deadline - self.world.now))

    def _from_cache(self) -> bool:
        """Hand out an idle connection, or see that there is none; dead ones that are noticed are
        given up."""
        while (lease := self.cache.take(self.world.now)) is not None:
            assert isinstance(lease.conn, Conn)
            if self._worn(lease, lease.conn):
                self._discard_dead(lease, lease.conn)
            else:
                self._hand_out(lease, lease.conn)
                return True
        return False

    def _worn(self, lease: Lease, conn: Conn) -> bool:
        return conn.closed or (lease.idle_s > CHECK_AFTER_S and conn.proc.dead)

    def _discard_dead(self, lease: Lease, conn: Conn) -> None:
        self.cache.report_failover_sign(lease, "")
        self.cache.close(lease, conn, ReleaseReason.BROKEN, self.world.now)
        conn.closed = True
        conn.proc.cut = True
        self.cache.closed(lease, ReleaseReason.BROKEN, gone=conn.proc.seen_dead)
        self.flush()

    def _hand_out(self, lease: Lease, conn: Conn) -> None:
        assert conn.lease is None, "a connection in two checkouts"
        assert conn not in self.users, "a connection in two checkouts"
        assert not conn.vacated, "a connection that was given is lent out"
        assert conn.proc.dead or conn.proc.cut or not conn.proc.dirty, (
            "a connection with an open transaction is lent"
        )
        lease.needs_configure = False
        lease.phase, lease.conn, conn.lease = Phase.IN_USE, None, lease
        self.users.append(conn)

    def wake(self, waiter: Waiter | None) -> None:
        if waiter is None:
            return
        lease = waiter.lease
        assert lease is not None
        assert waiter in self.waiters
        if self.waits_in_lane(waiter):
            self.wake_at_wait_socket(waiter)
            return
        if waiter in self.abandoned:  # nobody connects: at the next beat its lease looks lost
            return
        if lease.conn is None and lease not in self.connecting and waiter not in self.quitting:
            # The thread goes on to connect; its waiter stays, since it can still be interrupted.
            self.connecting.append(lease)

    def collect(self, *, configure_fails: bool = False) -> None:
        """Threads that were handed a connection take it."""
        for waiter in list(self.waiters):
            lease = waiter.lease
            if (
                lease is None
                or not isinstance(lease.conn, Conn)
                or lease.phase is not Phase.CONNECTING
            ):
                continue
            if waiter in self.quitting or waiter in self.abandoned or self.waits_in_lane(waiter):
                continue  # its thread is not there yet, or any more
            self.waiters.remove(waiter)
            waiter.lease = None
            if self._worn(lease, lease.conn):
                self._discard_dead(lease, lease.conn)
                self.take_slow_path(Waiter(_nobody, self.world.now), self.world.now + 60.0)
            elif lease.needs_configure and configure_fails:
                self._to_close(
                    [self.cache.close(lease, lease.conn, ReleaseReason.BROKEN, self.world.now)]
                )
            else:
                self._hand_out(lease, lease.conn)

    def give_up(self, waiter: Waiter) -> None:
        """A thread is interrupted, or its time is over, before it connects."""
        self.stop_waiting(waiter)
        if waiter in self.quitting:
            self.quit(waiter)

    def stop_waiting(self, waiter: Waiter) -> None:
        """The first half of that; what comes now is still for its waiter.

        Who is at a wait socket does all at once.
        """
        for thread in self.threads:
            if thread.waiter is waiter:
                self.interrupt(thread)
                return
        if waiter.lease in self.connecting:
            self.connecting.remove(waiter.lease)
        self.quitting.append(waiter)

    def quit(self, waiter: Waiter) -> None:
        """The second half."""
        self.quitting.remove(waiter)
        if waiter not in self.waiters:
            return  # refused meanwhile
        self.waiters.remove(waiter)
        self.wake(self.cache.give_up(waiter, self.world.now))
        self.flush()

    # --- threads: connect

    def connect(self, lease: Lease) -> None:
        self.connecting.remove(lease)
        if self.world.now > lease.connect_by:
            self._give_back(lease, gone=True, reason=ReleaseReason.UNUSED)
            return
        proc = self.world.server.connect(self.pool, self.tag, self.id, lease.token, self.world.now)
        if proc is None:
            self._give_back(lease, gone=True, error="connection refused", unreachable=True)
        else:
            self.opening.append(Opening(lease, proc))

    def fail(self, opening: Opening, how: str) -> None:
        """A connect fails: the server refuses ("full": everybody, "password": this worker), or
        there is no answer."""
        self.opening.remove(opening)
        if opening.proc.dead:
            self._give_back(
                opening.lease,
                gone=False,
                peer_closed=True,
                error="the server has gone",
                unreachable=True,
            )
        elif how == "timeout":
            opening.proc.holders.discard(self.id)
            self._give_back(opening.lease, gone=False, error="timeout expired", unreachable=True)
        else:
            self.world.server.end(opening.proc)
            self._give_back(
                opening.lease,
                gone=False,
                peer_closed=True,
                error=how,
                code="53300" if how == "full" else "28P01",
            )

    def _give_back(
        self, lease: Lease, *, gone: bool, peer_closed: bool = False, error: str = "",
        code: str = "", unreachable: bool = False, reason: ReleaseReason = ReleaseReason.FAILED,
    ) -> None:  # fmt: skip
        self.cache.closed(
            lease,
            reason,
            gone=gone,
            peer_closed=peer_closed,
            error=error,
            code=code,
            unreachable=unreachable,
        )
        for waiter in [waiter for waiter in self.waiters if waiter.lease is lease]:
            self.waiters.remove(waiter)
            self.wake(self.cache.give_up(waiter, self.world.now))
        self.flush()

    def deposit_early(self, opening: Opening) -> None:
        """The socket is deposited; the server has not said yet which backend this is."""
        if opening.conn is None:
            opening.conn = Conn(opening.proc)
            self.deposit(opening.lease, opening.conn)

    def opened(self, opening: Opening, how: str) -> None:
        """The new connection is deposited and described; or its thread is interrupted, or
        `configure` fails."""
        self.opening.remove(opening)
        if how != "not deposited":
            self.deposit_early(opening)
        lease, conn, now = opening.lease, opening.conn or Conn(opening.proc), self.world.now
        if conn.works and how != "interrupted":
            self.name_backend(lease, conn)
            try:
                self.cache.opened(lease, conn.proc.backend, float("inf"), conn, now)
            except SharedPoolError:
                self._to_close([self.cache.close(lease, conn, ReleaseReason.CLOSED, now)])
            else:
                if how == "configure":
                    self._to_close([self.cache.close(lease, conn, ReleaseReason.BROKEN, now)])
                else:
                    conn.movable = lease.movable = self.handover and how != "encrypted"
                    self._hand_out(lease, conn)
        else:
            self._to_close([self.cache.close(lease, conn, ReleaseReason.FAILED, now)])
        for waiter in [waiter for waiter in self.waiters if waiter.lease is lease]:
            self.waiters.remove(waiter)
            waiter.lease = None
        self.flush()

    def cancel(self, conn: Conn) -> None:
        """A query runs, and another thread cancels it."""
        conn.proc.busy = conn.works
        assert conn.lease is not None
        conn.lease.cancelled = True
        self.cache.outbox.append(CancelQuery(conn.lease.token))
        self.flush()

    # --- threads: checkin and close

    def checkin(self, conn: Conn, verdict: ReleaseReason | None = None) -> None:
        self.users.remove(conn)
        lease, conn.lease = conn.lease, None
        assert lease is not None
        conn.proc.busy = conn.proc.dirty = False
        if not conn.works:
            verdict = ReleaseReason.BROKEN
            self.cache.report_failover_sign(lease, "")
        if verdict is None and self.checkin_short(lease, conn):
            return
        outcome = self.cache.checkin(lease, conn, self.world.now, verdict)
        if isinstance(outcome, Closing):
            self._to_close([outcome])
        else:
            self.wake(outcome)
        self._to_close(self.cache.expire(self.world.now))
        self.flush()

    def _to_close(self, closing: list[Closing]) -> None:
        for each in closing:
            assert isinstance(each.lease.conn, Conn)
            self.closing.append((each, each.lease.conn))

    def finish_close(
        self, closing: Closing, conn: Conn, *, seen: bool, fit: bool = True, halt: int = 2
    ) -> None:
        """What is to be closed is given to others, if it may be, or its close is over.

        `seen`: the backend was seen to go, else it lives on for a while. `fit`: its reset succeeds.
        `halt`: the thread stops after so many steps of giving.
        """
        self.closing.remove((closing, conn))
        if closing.reason is ReleaseReason.SHARED:
            if not self.may_move(closing, conn):
                fit = False
                if conn.works and self.lay_back(closing, conn):
                    return
            if fit:
                lane_giving = self.give_in_lane(closing, conn)
                for _ in range(8 * halt):
                    if lane_giving in self.lane_giving:
                        self.step_giving(lane_giving)
                return
        if fit and self.may_give(closing, conn):
            giving = self.give(closing, conn)
            for _ in range(halt):
                if giving in self.giving:
                    self.go_on_giving(giving)
            return
        conn.closed = conn.proc.cut = True
        conn.proc.holders.discard(self.id)
        if seen:
            self.world.server.end(conn.proc)
        self.cache.closed(closing.lease, closing.reason, gone=conn.proc.seen_dead)
        if closing.reason is ReleaseReason.RETURN_DUE:
            self.cache.time_slice.note_given(self.world.now)
        self.flush()


def _nobody() -> None:
    """Nobody waits on a waiter here: threads are steps."""

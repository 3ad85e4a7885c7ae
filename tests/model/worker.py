"""Processes with a pool: what `local_pool.py`, `checkout.py` and `link.py` do around a real cache
(the desk's part of it: `desk.py`; the lane's: `moving.py`).

Every step that blocks in a real process (waiting, connecting, closing) is a step of its own here,
so that anything can happen in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharedpool.broker.core.commands import Process
from sharedpool.errors import SharedPoolError
from sharedpool.wire.board import PLACES
from sharedpool.wire.desk import Give, Live
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    CancelQuery,
    Deny,
    Gone,
    Grant,
    Hello,
    Recall,
    Reject,
    ReleaseReason,
    Stale,
    ToWorker,
    Welcome,
)
from sharedpool.wire.values import Phase, PoolSpec, Token
from sharedpool.worker.connection.state import CHECK_AFTER_S
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.dropped_leases import dropped, unfinished
from sharedpool.worker.core.lease import Closing, Lease, Waiter
from tests.model.desk import Conn
from tests.model.moving import InTheLane
from tests.model.scale import BEAT_S, EXPIRATION_S, HELLO_RETRY_S, LIMITS, MAX_WAITING, SILENCE_S
from tests.model.server import Proc

if TYPE_CHECKING:
    from tests.model.world import World


@dataclass(eq=False)
class Opening:
    """A thread inside `connect` or what follows."""

    lease: Lease
    proc: Proc
    conn: Conn | None = None  # once the socket was deposited


class Worker(InTheLane):
    """One process with one pool, any number of threads, and a link.

    `remote`: on another host than the broker.
    """

    def __init__(
        self, world: World, number: int, pool: str, *, remote: bool, handover: bool
    ) -> None:
        # Some keep what others want for longer than a holder is left alone (`NUDGE_S`).
        super().__init__(handover=handover, slice_s=(0.002, 0.05, 0.0)[number % 3])
        self.world = world
        self.id = b"w%d" % number
        self.pool = pool
        self.remote = remote
        self.process = Process(number, number)
        self.cache = Cache(EXPIRATION_S, slice_s=self.slice_s)
        self.messages = BrokerMessages(self.cache)
        self.line = world.network.line(self.id)
        self.established = False
        self.epoch = 0
        self.frozen = False
        self.shares_line = (
            number % 3 == 0 and not remote
        )  # with another pool of its process, which says HELLO first
        self.most_wait_sockets = (PLACES, 2, PLACES, 1)[number % 4]
        self.joined_epoch = 0  # whose lane it may be in
        self.tag = ""
        self.waiters: list[Waiter] = []
        self.connecting: list[Lease] = []
        self.quitting: list[Waiter] = []
        self.opening: list[Opening] = []
        self.users: list[Conn] = []
        self.closing: list[tuple[Closing, Conn]] = []
        self.patience: dict[int, bool] = {}
        self.beat_at = self.hello_at = self.heard_at = world.now
        self.denied = 0

    def __repr__(self) -> str:
        return f"<{self.id.decode()} of pool {self.pool}{', frozen' if self.frozen else ''}>"

    # --- the link

    def hello(self) -> None:
        self.established = False
        now = self.hello_at = self.world.now
        self.note_arrivals()
        leases, seen, first = self.messages.register(now, {})
        expiration_ms, group = int(EXPIRATION_S * 1000), self.world.group_of.get(self.pool, "")
        spec = PoolSpec(
            self.pool, LIMITS[self.pool], expiration_ms, 0, "", MAX_WAITING[self.pool], group
        )
        host = "elsewhere" if self.remote else "here"
        told = (self.process.pid, host, self.id.decode(), spec, leases, seen)
        self.line.up.append(Hello(PROTOCOL_VERSION, *told, first=first))
        broker = self.world.broker
        if self.shares_line and broker is not None and broker.ledger.epoch >= self.epoch:
            # Another pool of this process is registered already.
            self._go_to_desk_of(broker.ledger.epoch, "desk")

    def _go_to_desk_of(self, epoch: int, path: str) -> None:
        if epoch != self.epoch or self.desk is None:
            self.epoch = epoch
            self.go_to_desk(path)

    def start_over(self) -> None:
        """The link's session ends and the next begins."""
        self.line.drop_hellos()
        self.heard_at = self.world.now
        self.hello()

    def notice_line(self) -> None:
        """The session's line to the desk is closed, by its broker's death as a rule."""
        if self.desk is not None and self.desk.torn:
            self.desk = None
            if self.established or self.shares_line:
                self.start_over()

    def keep_in_touch(self) -> None:
        """Do what the link does by the clock."""
        now = self.world.now
        self.notice_line()
        if now >= self.timer_at:
            self.timer_at = float("inf")
            self.look_in_lane()
            self.flush()
        if not self.established:
            if now - self.hello_at >= HELLO_RETRY_S:
                self.start_over()
        elif now - self.beat_at >= BEAT_S:
            if now - self.heard_at > SILENCE_S:
                self.start_over()
            else:
                self.beat()

    def beat(self) -> None:
        now = self.beat_at = self.world.now
        if self.established:
            self.beat_in_lane()
            self._to_close(self.cache.expire(now))
            assert not dropped(self.cache.leases.values(), set(self.cache.idle), now)
            self.cache.outbox.append(self.cache.reporter.renewal(now, {}))
            self.deposit_all()
            begun = {x.lease for x in unfinished(self.cache.leases.values(), now)}
            giving = {step.closing.lease for step in self.giving}
            giving |= {step.closing.lease for step in self.lane_giving}
            assert not begun & giving
            self.flush()

    def flush(self) -> None:
        out = self.cache.outbox
        while self.established and out:
            self.line.up.append(out.popleft())

    def receive(self, message: ToWorker) -> None:
        """Handle a message as `Link._receive` and `Receiver.receive` do."""
        now, cache = self.world.now, self.cache
        self.heard_at = now
        if isinstance(message, Reject):
            assert not message.fatal
            self.hello()
            return
        if isinstance(message, Welcome):
            if message.epoch >= self.epoch:
                self._welcomed(message)
                self.flush()
            return
        if not self.established:
            return
        match message:
            case Stale():
                self._to_close(cache.renew_generation(message.generation, now))
            case Ack():
                cache.reporter.acknowledged(message.gone)
                self._to_close(cache.renew_generation(message.generation, now))
                self._revoke(message.revoked)
            case Grant():
                self.wake(self.messages.granted(message, now))
            case Deny():
                self._denied(message)
            case Recall():
                self.look_in_lane()
                self._to_close(self.messages.recalled(message, now, {}))
            case Gone():
                self._ended(message.tokens)
        self.flush()

    def _welcomed(self, welcome: Welcome) -> None:
        now = self.world.now
        self._go_to_desk_of(welcome.epoch, welcome.desk)
        self.established = True
        self._to_close(
            self.messages.welcomed(welcome.epoch, welcome.generation, now, welcome.served)
        )
        self.tag = welcome.tag
        if welcome.epoch != self.joined_epoch:
            self.leave_lane(former_brokers=True)
        self.joined_epoch = welcome.epoch
        self._revoke(welcome.revoked)
        self.welcome_at_desk(welcome)
        self.cache.waiters.registered(welcome.served, now)
        self.accept()

    def _denied(self, deny: Deny) -> None:
        waiter = self.cache.waiters.denied(deny)
        if waiter is not None:
            self.waiters.remove(waiter)
            self.wake_at_wait_socket(waiter)
            self.denied += 1

    def _revoke(self, tokens: list[Token]) -> None:
        for token in tokens:
            lease = self.cache.ended(token)
            conn = None if lease is None else self.conn_of(lease)
            if conn is not None:
                assert not conn.vacated
                conn.proc.cut = True

    def _ended(self, tokens: list[Token]) -> None:
        for token in tokens:
            lease = self.cache.ended(token)
            if lease is not None and lease.phase is Phase.IDLE:
                self.cache.report_failover_sign(lease, "")
            if lease is not None and isinstance(lease.conn, Conn):
                proc = lease.conn.proc
                assert proc.dead or self.world.proxied, (
                    f"GONE names {lease.token}, whose backend lives"
                )
                lease.conn.closed = proc.cut = True

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

    # --- the end

    def leave(self) -> None:
        """`release_all`, when nothing is being connected: everything is closed, then BYE."""
        assert not self.connecting
        assert not self.opening
        assert not self.quitting
        now = self.world.now
        self.cache.stop_keeping()
        self.cache.waiters.fail(RuntimeError("disposed"))
        for thread in list(self.threads):
            self.interrupt(thread)
        self.find_abandoned()
        self._to_close(self.cache.take_all_idle(now))
        for conn in self.users:
            assert conn.lease is not None
            self._to_close([self.cache.close(conn.lease, conn, ReleaseReason.CLOSED, now)])
        self.users.clear()
        for waiter in self.waiters:
            if waiter.lease is not None and isinstance(
                waiter.lease.conn, Conn
            ):  # handed on, not yet taken
                self._to_close(
                    [self.cache.close(waiter.lease, waiter.lease.conn, ReleaseReason.CLOSED, now)]
                )
        for closing, conn in list(self.closing):
            conn.proc.busy = conn.proc.dirty = False
            self.finish_close(closing, conn, seen=True)
        for giving in list(self.giving):
            while giving in self.giving:
                self.go_on_giving(giving)
        for lane_giving in list(self.lane_giving):
            while lane_giving in self.lane_giving:
                self.step_giving(lane_giving)
        assert not self.cache.leases
        self.flush()
        if self.established:
            self.line.up.append(self.cache.reporter.farewell(self.cache.hits))
        self.leave_lane()
        self.leave_desk()

    def die(self) -> None:
        """SIGKILL: what it held open is open no longer, unless the broker has it too."""
        for proc in self.world.server.procs:
            proc.holders.discard(self.id)
        self.die_in_lane()
        self.leave_desk()

    def _say_given(self, closing: Closing, live: Live) -> bool:
        return self.desk is not None and self.desk.say(
            Give(self.id, closing.lease.token, closing.reason, live)
        )

    @property
    def unconnected(self) -> dict[Token, bool]:
        """Leases without a connection, and whether their connects have begun."""
        begun = {opening.lease.token for opening in self.opening}
        return {
            x.token: x.token in begun
            for x in self.cache.leases.values()
            if x.phase is Phase.CONNECTING
        }


def _nobody() -> None:
    """Nobody waits on a waiter here: threads are steps."""

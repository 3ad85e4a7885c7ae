"""Processes with a pool: what `link.py` does around a real cache (its threads: `checkouts.py`; the
desk's part of it: `desk.py`; the lane's: `moving.py`).

Every step that blocks in a real process (waiting, connecting, closing) is a step of its own here,
so that anything can happen in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharedpool.broker.core.commands import Process
from sharedpool.wire.board import PLACES
from sharedpool.wire.desk import Give, Live
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
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
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.dropped_leases import dropped, unfinished
from sharedpool.worker.core.lease import Closing, Lease, Waiter
from tests.model.checkouts import Checkouts, Opening
from tests.model.desk import Conn
from tests.model.scale import BEAT_S, EXPIRATION_S, HELLO_RETRY_S, LIMITS, MAX_WAITING, SILENCE_S

if TYPE_CHECKING:
    from tests.model.world import World


class Worker(Checkouts):
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
                self._to_close(self.messages.renew_generation(message.generation, now))
            case Ack():
                cache.reporter.acknowledged(message.gone)
                self._to_close(self.messages.renew_generation(message.generation, now))
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

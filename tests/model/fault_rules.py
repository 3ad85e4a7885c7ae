"""What happens to the network, the processes, the server and the broker."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.messages import START_UP_LIMIT_S
from tests.model.rules import picks
from tests.model.scale import LIMITS, TTL_S
from tests.model.server import Stage
from tests.model.thread_rules import ThreadRules
from tests.model.worker import Worker

MOST_WORKERS = 5


class FaultRules(ThreadRules):
    """Deliveries, time, deaths, restarts, and an operator's orders."""

    # --- network and clock

    @rule(pick=picks)
    def deliver_up(self, pick: int) -> None:
        if found := self.line(pick, "up"):
            for _ in range(1 + found[1] % 3):
                if found[0].up:
                    self.world.deliver_up(found[0])

    @rule(pick=picks)
    def deliver_down(self, pick: int) -> None:
        if found := self.line(pick, "down"):
            worker = self.world.workers.get(found[0].session)
            for _ in range(1 + found[1] % 3):
                if worker is not None and not worker.frozen and found[0].down:
                    self.world.deliver_down(worker)

    @rule()
    def deliver_all(self) -> None:
        self.world.deliver_all()

    @rule(pick=picks)
    def beat(self, pick: int) -> None:
        self.one(pick)[0].beat()

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.3, 1.1, 3.0, 6.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(seconds=st.sampled_from([3.0, TTL_S + 1, 50.0]))
    def pass_long(self, seconds: float) -> None:
        self.world.pass_long(seconds)

    @rule()
    def to_the_next_deadline(self) -> None:
        if self.world.broker is not None:
            deadline = self.world.broker.ledger.next_deadline()
            if deadline is not None:
                self.world.pass_time(max(0.0, deadline - self.world.now))

    # --- processes

    @precondition(lambda self: len(self.world.workers) < MOST_WORKERS)
    @rule(pick=picks)
    def start(self, pick: int) -> None:
        pool = sorted(LIMITS)[pick % len(LIMITS)]
        self.world.start(pool, remote=pick // 2 % 4 == 3, handover=pick // 8 % 4 != 3)

    @precondition(lambda self: len(self.world.workers) > 2)
    @rule(pick=picks)
    def die(self, pick: int) -> None:
        workers = list(self.world.workers.values())
        worker = workers[pick % len(workers)]
        if not worker.frozen and len(self.world.awake) < 2:
            return
        self.world.die(worker)

    @precondition(
        lambda self: (
            len(self.world.awake) > 2 and any(worker.opening for worker in self.world.awake)
        )
    )
    @rule(pick=picks)
    def die_in_a_connect(self, pick: int) -> None:
        """Its backend starts up, and nobody has heard of it; what waits for the slot is served when
        that is over."""
        world = self.world
        connecting = [worker for worker in world.awake if worker.opening]
        worker = connecting[pick % len(connecting)]
        world.die(worker)
        if (broker := world.broker) is not None and pick % 2 and worker.id in broker.deaths:
            broker.notice_death(worker.id)
            while broker.calls and world.broker is broker:
                broker.hear_word()

    @precondition(lambda self: len(self.world.awake) > 2)
    @rule(pick=picks)
    def leave(self, pick: int) -> None:
        worker, pick = self.one(pick)
        if not (worker.connecting or worker.opening or worker.quitting):
            self.world.leave(worker, exits=bool(pick % 3))

    @precondition(lambda self: len(self.world.awake) > 2)
    @rule(pick=picks)
    def freeze(self, pick: int) -> None:
        self.one(pick)[0].frozen = True

    @precondition(lambda self: len(self.world.awake) > 2)
    @rule(pick=picks)
    def oversleep(self, pick: int) -> None:
        """A worker is frozen for longer than its TTL, or any connect, and wakes up when others may
        have its slots."""
        sleeper, pick = self.one(pick)
        sleeper.frozen = True
        self.world.pass_long(TTL_S + 1 + (pick // 8 % 2) * START_UP_LIMIT_S)
        other, pick = self.one(pick)
        for _ in range(pick % 3):
            other.checkout(60.0)
        self.world.deliver_all()
        broker = self.world.broker
        if broker is not None and pick // 4 % 2:
            for _ in list(broker.fences):
                broker.work(0)
        self._thaw(sleeper)

    @precondition(lambda self: any(worker.frozen for worker in self.world.workers.values()))
    @rule(pick=picks)
    def thaw(self, pick: int) -> None:
        frozen = [worker for worker in self.world.workers.values() if worker.frozen]
        self._thaw(frozen[pick % len(frozen)])

    @staticmethod
    def _thaw(worker: Worker) -> None:
        worker.frozen = False
        worker.keep_in_touch()

    @rule(pick=picks)
    def register_again(self, pick: int) -> None:
        self.one(pick)[0].start_over()

    # --- the server

    @rule(pick=picks)
    def backend_moves(self, pick: int) -> None:
        """A backend exits by itself, ends its query, or goes on with its start-up."""
        procs = self.world.server.procs
        if not procs:
            return
        proc = procs[pick % len(procs)]
        if proc.abandoned or pick // 8 % 8 == 0:
            self.world.server.end(proc)
        elif proc.stage is not Stage.OPEN:
            self.world.server.advance(proc, Stage(proc.stage + 1), self.world.now)
        elif not proc.workers:
            proc.busy = False

    @rule(pick=picks)
    def server_stops_or_starts(self, pick: int) -> None:
        if not self.world.server.up:
            self.world.server.start()
        elif pick % 8 == 0:
            self.world.server.stop()
            if pick % 16 == 0:
                self.world.server.start()

    # --- the broker

    @rule(pick=picks)
    def broker_hears(self, pick: int) -> None:
        """A death, a backend's end, or what the control connection has found out, reaches the
        ledger."""
        broker = self.world.broker
        if broker is None:
            return
        for _ in range(3):
            pick += 1
            if pick % 3 == 0 and (deaths := broker.deaths):
                broker.notice_death(deaths[pick % len(deaths)])
            elif pick % 3 == 1 and (endings := broker.endings):
                broker.see(endings[pick % len(endings)])
            elif pick % 3 == 2 and broker.calls:
                broker.hear_word()
            else:
                continue
            return

    @precondition(lambda self: self.world.broker is not None and self.world.broker.has_control_work)
    @rule(pick=picks)
    def control_works(self, pick: int) -> None:
        assert self.world.broker is not None
        self.world.broker.work(pick)

    @rule(pick=picks)
    def broker_dies_or_starts(self, pick: int) -> None:
        world = self.world
        if world.broker is None:
            if pick % 4 == 0:
                world.journal.damage(pick // 4)
            world.start_broker()
            return
        match pick % 8:
            case 0:
                world.kill_broker(pick // 16)
            case 1 | 2:
                world.broker.fuse = pick // 8 % 12
            case 3:
                world.kill_broker(pick // 16)
                world.start_broker()
            case 4 if pick // 8 % 4 == 0:
                world.broker.execute(world.broker.ledger.drain(world.now))
            case 5:
                world.stall_broker((0.5, 2.0, TTL_S + 1)[pick // 8 % 3])

    @rule(pick=picks)
    def operate(self, pick: int) -> None:
        """An operator's order. Limits are only lowered, and raised again to what they were."""
        broker = self.world.broker
        if broker is None:
            return
        pool, rest = (*LIMITS, "")[pick // 8 % 3], pick // 24
        match pick % 8:
            case 0 if rest % 3 == 0:
                broker.order(Order(0, OrderKind.PAUSE, pool))
            case 1 | 2 | 3:
                broker.order(Order(0, OrderKind.RESUME, pool if pick % 8 == 1 else ""))
            case 4:
                most = LIMITS[pool] if pool else self.world.cap or 1
                broker.order(Order(0, OrderKind.LIMIT, pool, 1 + rest % most))
            case 5:
                broker.restore_limits()
            case 6:
                worker, _ = self.one(pick)
                broker.order(Order(0, OrderKind.DRAIN, number=worker.process.pid))
            case 7:
                leases = broker.slots.leases
                for token in list(leases)[rest % 4 : rest % 4 + 1]:
                    # An operator kills a lease without a connection only if its worker is gone: see
                    # `Admin.kill`.
                    if leases[token].findable or leases[token].session.id not in self.world.workers:
                        broker.order(Order(0, OrderKind.KILL, token=token))

    @precondition(lambda self: len(self.world.awake) > 2)
    @rule(pick=picks)
    def bereave(self, pick: int) -> None:
        """The broker dies and its journal is lost, while a worker is frozen or dies; time passes,
        everybody asks."""
        world = self.world
        sleeper, pick = self.one(pick)
        sleeper.frozen = True
        world.kill_broker(pick // 16)
        if pick % 4 == 0:
            world.die(sleeper)
        world.journal.damage(0 if pick // 4 % 2 else pick)
        world.start_broker()
        world.pass_long((1.0, TTL_S + 1)[pick // 8 % 4 > 0])
        for _ in range(pick // 8 % 4):
            if (broker := world.broker) is not None:
                broker.work(0)
                if broker.calls:
                    broker.hear_word()
                world.pass_time(0.05)
        self._crowd(2)
        if sleeper.id in world.workers and pick // 32 % 2:
            self._thaw(sleeper)

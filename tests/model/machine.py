"""What can happen, as rules.

A step is one rule; `pick` chooses among what is there to be chosen.

One small number for each step instead of several draws: Hypothesis spends more time on drawing than
the world on stepping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sharedpool.broker.core.handover import NUDGE_LIMIT_S, NUDGE_S, TRY_AGAIN_S
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.messages import START_UP_LIMIT_S, ReleaseReason
from sharedpool.worker.core.lease import Waiter
from tests.model.desk import Giving, Lack
from tests.model.lane_threads import LaneGiving, Thread
from tests.model.network import Line
from tests.model.peace import check_all_slots_can_be_had, heal, let_pass, quiesce
from tests.model.promises import (
    check,
    check_lanes_are_empty,
    check_nobody_waits_in_vain,
    check_nothing_is_kept_back,
)
from tests.model.scale import LIMITS, TTL_S
from tests.model.server import Stage
from tests.model.worker import Worker
from tests.model.world import World

MOST_WORKERS = 5
MOST_WAITERS = 6
_WAITS = (0.0, 2.0, 60.0, 60.0, 600.0)
_OPENED = ("", "", "", "", "not deposited", "interrupted", "configure", "encrypted")
_TROUBLE = ("", "57P01", "25006", "57P02")

picks = st.integers(0, 1023)


def some(attribute: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Allow a step only when an awake worker has something in `attribute`: no steps are wasted."""
    return precondition(
        lambda self: any(
            getattr(worker, attribute)
            for worker in self.world.workers.values()
            if not worker.frozen
        )
    )


class GoodNetwork(RuleBasedStateMachine):
    """A network that delivers every message, in order for each session, at its own pace."""

    bad_network = False
    steps: ClassVar[int] = 0
    moved: ClassVar[int] = 0  # connections, in the lane
    passed: ClassVar[int] = 0  # by the broker
    lost: ClassVar[int] = 0  # in a former broker's lane
    world: World

    @initialize(pick=picks)
    def begin(self, pick: int) -> None:
        cap = (None, None, 3, 4)[pick % 4]
        # Small numbers are drawn most often: they stand for what is usual.
        has_desk, handover = pick // 4 % 8 != 7, pick // 32 % 4 != 3
        grouping = (None, None, None, 0, 1, 2)[pick // 4 % 6] if cap is not None else None
        self.world = World(
            cap,
            has_desk=has_desk,
            handover=handover,
            in_order=not self.bad_network,
            grouping=grouping,
            proxied=pick // 8 % 3 == 2,
        )
        for pool in LIMITS:
            self.world.start(pool)
            self.world.start(pool, remote=pick // 128 % 4 == 3, handover=pick // 512 == 0)
        self.world.deliver_all()
        if cap is None and self.world.handover:
            self._move(pick)

    # --- choosing

    def one(self, pick: int, having: str = "") -> tuple[Worker, int]:
        """Choose a worker that is not frozen and has something in its attribute `having`; and the
        rest of `pick`."""
        found = [
            w
            for w in self.world.workers.values()
            if not w.frozen and (not having or getattr(w, having))
        ]
        return found[pick % len(found)], pick // len(found)

    def line(self, pick: int, way: str) -> tuple[Line, int] | None:
        """Choose a line with something under way."""
        found = [line for line in self.world.network.lines.values() if getattr(line, way)]
        return (found[pick % len(found)], pick // len(found)) if found else None

    # --- threads

    @rule(pick=picks)
    def checkout(self, pick: int) -> None:
        worker, pick = self.one(pick)
        if len(worker.waiters) < MOST_WAITERS:
            for _ in range(1 + pick // 8 % 3):
                worker.checkout(_WAITS[pick % len(_WAITS)])

    @rule(pick=picks)
    def crowd(self, pick: int) -> None:
        """Everybody wants connections, and gets as many as there are."""
        self._crowd(1 + pick % 3)

    def _crowd(self, times: int) -> None:
        world = self.world
        for worker in world.awake:
            for _ in range(times if len(worker.waiters) < MOST_WAITERS else 0):
                worker.checkout(60.0)
        world.deliver_all()
        for worker in world.awake:
            for lease in list(worker.connecting):
                worker.connect(lease)
            for opening in list(worker.opening):
                world.server.advance(opening.proc, Stage.OPEN, world.now)
                worker.opened(opening, "")
        world.deliver_all()

    @some("users")
    @rule(pick=picks)
    def checkin(self, pick: int) -> None:
        worker, pick = self.one(pick, "users")
        conn = worker.users[pick % len(worker.users)]
        match pick // len(worker.users) % 6:
            case 0:
                worker.checkin(conn, ReleaseReason.BROKEN)
            case 1:
                for each in list(worker.users):
                    worker.checkin(each)
            case _:
                worker.checkin(conn)

    @some("users")
    @rule(pick=picks)
    def use(self, pick: int) -> None:
        """A query begins; or one fails in a way that tells of a failover."""
        worker, pick = self.one(pick, "users")
        conn = worker.users[pick % len(worker.users)]
        if pick // 4 % 4 == 1:
            worker.cancel(conn)
        elif pick // 4 % 4:
            conn.proc.busy = conn.works and pick // 16 % 2 == 0
            conn.proc.dirty = conn.works
        elif conn.lease is not None:
            worker.cache.report_failover_sign(conn.lease, _TROUBLE[pick // 16 % len(_TROUBLE)])
            worker.flush()

    @some("waiters")
    @rule(pick=picks)
    def collect(self, pick: int) -> None:
        worker, pick = self.one(pick, "waiters")
        worker.collect(configure_fails=pick % 16 == 7)

    @some("waiters")
    @rule(pick=picks)
    def give_up(self, pick: int) -> None:
        worker, pick = self.one(pick, "waiters")
        in_connect = [opening.lease for opening in worker.opening]
        waiters = [x for x in worker.waiters if x not in worker.abandoned]
        waiters = [x for x in waiters if x.lease not in in_connect or x.lease is None]
        if not waiters:
            return
        waiter = waiters[pick % len(waiters)]
        if waiter in worker.quitting:
            worker.quit(waiter)
        elif pick // len(waiters) % 2:
            worker.stop_waiting(waiter)
        else:
            worker.give_up(waiter)

    @some("connecting")
    @rule(pick=picks)
    def connect(self, pick: int) -> None:
        worker, pick = self.one(pick, "connecting")
        worker.connect(worker.connecting[pick % len(worker.connecting)])

    @some("opening")
    @rule(pick=picks)
    def go_on_connecting(self, pick: int) -> None:
        """The server or the worker takes the next step of a connect, or the connect fails."""
        worker, pick = self.one(pick, "opening")
        opening = worker.opening[pick % len(worker.opening)]
        pick //= len(worker.opening)
        proc = opening.proc
        if pick % 8 == 0:
            how = ("timeout", "timeout", "full", "password")[pick // 8 % 4]
            if proc.stage is not Stage.OPEN:
                worker.fail(opening, how)
        elif proc.dead or proc.stage is Stage.OPEN:
            if pick % 8 == 1:
                worker.deposit_early(opening)
            else:
                worker.opened(opening, _OPENED[pick // 8 % len(_OPENED)])
        else:
            stage = Stage.OPEN if pick % 8 > 2 else Stage(proc.stage + 1)
            self.world.server.advance(proc, stage, self.world.now)

    @some("closing")
    @rule(pick=picks)
    def finish_close(self, pick: int) -> None:
        worker, pick = self.one(pick, "closing")
        closing, conn = worker.closing[pick % len(worker.closing)]
        worker.finish_close(
            closing, conn, seen=pick // 8 % 4 != 0, fit=pick // 32 % 8 != 7, halt=2 - pick // 4 % 3
        )

    @precondition(lambda self: self.world.proxied and self.world.server.procs)
    @rule(pick=picks)
    def proxy_closes(self, pick: int) -> None:
        """The proxy ends a session on its client's side, whatever the backend does."""
        procs = [proc for proc in self.world.server.procs if proc.stage is Stage.OPEN]
        if procs:
            procs[pick % len(procs)].cut = True

    # --- the desk

    @rule(pick=picks)
    def go_on_at_the_desk(self, pick: int) -> None:
        """A thread that gives takes its next step; or the link reads what came on its line."""
        worker, pick = self.one(pick)
        steps: list[Giving | None] = [*worker.giving, *([None] if worker.readable else [])]
        if steps:
            step = steps[pick % len(steps)]
            if step is None:
                worker.read_home()
            else:
                worker.go_on_giving(step)

    @rule(pick=picks)
    def deliver_packet(self, pick: int) -> None:
        """The broker reads at the desk, from one line or from all."""
        if found := [wire for wire in self.world.network.wires if wire.ready]:
            for wire in found if pick % 4 == 0 else [found[pick // 4 % len(found)]]:
                if not wire.torn:
                    self.world.deliver_packet(wire)

    @rule(pick=picks)
    def take_turns(self, pick: int) -> None:
        """More want connections than there are, and hand them on; it stops somewhere
        in the middle."""
        world = self.world
        world.start_broker()
        self._crowd(2)
        for turn in range(6 + pick % 8):
            pick = (pick * 5 + 3) % 1021
            asker, _ = self.one(pick)
            if len(asker.waiters) < 2:
                asker.checkout(60.0)
            if pick % 7 == 3:
                asker.lacks = (Lack.SOCKET, Lack.SHELL, Lack.WAIT_SOCKET)[pick % 3]
            if holders := [worker for worker in world.awake if worker.users or worker.closing]:
                self._give_back(holders[turn % len(holders)], pick)
            if pick % 7:
                self._deliver_packets()
            if pick % 11 > 1:
                self._step_all()

    def _give_back(self, holder: Worker, pick: int) -> None:
        """A process checks a connection in, perhaps cancelling its query first, or closes one."""
        world = self.world
        if holder.closing:
            if pick % 8:
                closing, conn = holder.closing[0]
                halt = 2 if pick % 9 else pick // 9 % 2
                holder.finish_close(closing, conn, seen=True, halt=halt)
            return
        if pick % 5 == 0:
            holder.cancel(holder.users[0])
            while holder.line.up and world.broker is not None:
                world.deliver_up(holder.line)
        holder.checkin(holder.users[0])

    def _deliver_packets(self) -> None:
        """The broker reads all that has come to the desk."""
        for wire in list(self.world.network.wires):
            while wire.up and not wire.torn:
                self.world.deliver_packet(wire)

    def _step_all(self) -> None:
        """Each process reads what has come, and takes a step."""
        for each in self.world.awake:
            each.read_all()
            for thread in [thread for thread in each.threads if thread.ready]:
                each.step(thread)
            each.collect()

    # --- the lane

    def _lane_step(self, pick: int) -> bool:
        """One process takes its next step in the lane, or the broker."""
        steps: list[tuple[Worker | None, object]] = []
        for awake in self.world.awake:
            steps += [(awake, thread) for thread in awake.threads if thread.ready]
            steps += [(awake, giving) for giving in awake.lane_giving]
            steps += [(awake, waiter) for waiter in awake.woken[:1]]
            if awake.wait_socket_news:
                steps.append((awake, None))
        if self.world.broker is not None:
            steps += [(None, pool) for pool in self.world.broker.lanes_to_read]
        if not steps:
            return False
        worker, step = steps[pick % len(steps)]
        if worker is None:
            assert self.world.broker is not None
            assert isinstance(step, str)
            self.world.broker.read_lane(step)
        elif isinstance(step, Thread):
            worker.step(step)
        elif isinstance(step, LaneGiving):
            worker.step_giving(step)
        elif isinstance(step, Waiter):
            worker.take_freed_wait_socket()
        else:
            worker.look_in_lane()
            worker.flush()
        return True

    @rule(pick=picks)
    def lane_steps(self, pick: int) -> None:
        for _ in range(1 + pick % 7):
            pick = (pick * 5 + 3) % 1021
            self._lane_step(pick)

    @some("threads")
    @rule(pick=picks)
    def interrupt_in_lane(self, pick: int) -> None:
        worker, pick = self.one(pick, "threads")
        count = len(worker.threads)
        worker.interrupt(worker.threads[pick % count], twice=pick // count % 4 == 3)

    @rule(pick=picks)
    def fail_resets(self, pick: int) -> None:
        worker, pick = self.one(pick)
        worker.unfit = pick % 3

    @property
    def _is_moving(self) -> bool:
        broker = self.world.broker
        return broker is not None and any(end.board.moving for end in broker.lanes.values())

    def _get_moving(self) -> bool:
        """Have connections handed on until the broker lets them move past it."""
        world = self.world
        if self._is_moving:
            return True
        world.start_broker()
        world.server.start()
        if (broker := world.broker) is not None:
            broker.order(Order(0, OrderKind.RESUME))
            broker.restore_limits()
        self._end_hinderers()
        while sum(worker.pool == "a" for worker in world.awake) < 3:
            world.start("a")
        for turn in range(10):
            quiesce(world)
            if self._is_moving:
                return True
            self._make_ready(turn)
            for worker in world.awake:
                if worker.pool == "a" and len(worker.waiters) + len(worker.threads) < 2:
                    worker.checkout(60.0)
            quiesce(world)
            world.pass_time(0.6)  # longer than a time slice
            quiesce(world)
            if holders := [worker for worker in world.awake if worker.users and worker.pool == "a"]:
                # Not in the order in which they ask: each would serve himself.
                holder = holders[-1 - turn % len(holders)]
                holder.checkin(holder.users[0])
        return self._is_moving

    def _end_hinderers(self) -> None:
        """End the workers because of which no connection would move."""
        world = self.world
        for worker in list(world.workers.values()):
            if worker.pool == "a":  # one that cannot take part halts it
                takes_part = worker.handover and not worker.remote
                hinders = not takes_part or worker.frozen or worker.broken_shells
            else:  # what another pool holds of the cap may keep this one below its own limit
                hinders = world.cap is not None
            if hinders:
                world.die(worker)

    def _make_ready(self, turn: int) -> None:
        """Do away with what keeps the broker from it for long."""
        world = self.world
        world.start_broker()
        broker = world.broker
        assert broker is not None
        broker.fuse = None
        pool = broker.slots.pools.get("a")
        if broker.slots.grant_stop.holding_back or (
            pool is not None and pool.suspects and turn % 4 == 1
        ):
            world.pass_long(TTL_S + 1)
        elif pool is not None and pool.cancel_works is False:
            world.kill_broker(0)
            world.start_broker()
        elif pool is not None and pool.cancel_works is None and world.now < pool.try_at:
            world.pass_long(TRY_AGAIN_S)

    @precondition(lambda self: not self.world.groups and self.world.handover)
    @rule(pick=picks)
    def move(self, pick: int) -> None:
        """Connections move past the broker; it stops somewhere in the middle."""
        self._move(pick)

    @precondition(lambda self: not self.world.groups and self.world.handover)
    @rule(pick=picks)
    def fail_in_the_lane(self, pick: int) -> None:
        """The same, and then somebody is killed who is in the middle of something, or stopped, or
        the broker dies."""
        world = self.world
        self._move(pick)
        busy = [worker for worker in world.awake if worker.lane_giving or worker.threads]
        if pick % 4 == 3:
            world.kill_broker(pick // 4)
            if pick // 4 % 2:
                world.start_broker()
        elif busy and len(world.awake) > 2:
            worker = busy[pick // 4 % len(busy)]
            if pick % 4 == 2:
                worker.frozen = True
            else:
                world.die(worker)
        self._move(pick // 2, as_it_is=True)

    @precondition(lambda self: not self.world.groups and self.world.handover)
    @rule(pick=picks)
    def die_before_the_welcome(self, pick: int) -> None:
        """The broker dies while connections move, and somebody has its invitation to the lane, but
        not its WELCOME."""
        world = self.world
        if not self._get_moving() or (broker := world.broker) is None:
            return
        worker = world.start("a", shares_line=True)
        while worker.line.up and world.broker is broker:
            world.deliver_up(worker.line)
        while worker.desk is not None and worker.desk.ready and world.broker is broker:
            world.deliver_packet(worker.desk)
        worker.read_all()
        if pick % 4 == 0:
            world.deliver_all()
        world.kill_broker(pick // 4)
        worker.line.down.clear()
        world.start_broker()
        for _ in range(
            4 if pick // 4 % 4 else 0
        ):  # nobody else waits any more: that would make another lane
            world.pass_time(1.1)
            quiesce(world)
            for holder in world.awake:
                for conn in list(holder.users):
                    holder.checkin(conn)
        for _ in range(1 + pick // 16 % 3):
            worker.checkout(60.0)

    @precondition(lambda self: not self.world.groups and self.world.handover)
    @rule(pick=picks)
    def go_over_to_the_next_broker(self, pick: int) -> None:
        """The broker dies while connections move.

        They go on in its lane until each worker has left that.
        """
        world = self.world
        self._move(pick)
        world.kill_broker(pick // 4)
        world.start_broker()
        for _ in range(60):
            pick = (pick * 5 + 3) % 1021
            worker = world.awake[pick // 16 % len(world.awake)]
            match pick % 16:
                case 0 | 1:
                    worker.notice_line()
                case 2 | 3 if worker.line.up:
                    world.deliver_up(worker.line)
                case 4 | 5 if worker.line.down:
                    world.deliver_down(worker)
                case 6 if worker.users:
                    worker.checkin(worker.users[0])
                case 7 if len(worker.waiters) + len(worker.threads) < 3:
                    worker.checkout(60.0)
                case 8:
                    worker.beat()
                case _:
                    self._lane_step(pick // 16)

    def _move(self, pick: int, *, as_it_is: bool = False) -> None:
        world = self.world
        if not (as_it_is or self._get_moving()):
            return
        for _ in range(20 + pick % 61):
            pick = (pick * 5 + 3) % 1021
            found = [worker for worker in world.awake if worker.end is not None]
            if not found:
                return
            askers = [worker for worker in found if len(worker.waiters) + len(worker.threads) < 3]
            holders = [worker for worker in found if worker.users]
            closers = [worker for worker in found if worker.closing]
            match pick % 16:
                case 0 | 1 | 2 if askers:
                    askers[pick // 16 % len(askers)].checkout((60.0, 60.0, 0.3)[pick % 3])
                case 3 | 4 | 5 | 6 if holders:
                    holder = holders[pick // 16 % len(holders)]
                    holder.checkin(holder.users[0])
                case 7 | 8 if closers:
                    worker = closers[pick // 16 % len(closers)]
                    closing, conn = worker.closing[0]
                    worker.finish_close(closing, conn, seen=True, halt=pick // 16 % 2)
                case 9:
                    for worker in found:
                        worker.collect()
                case 10:
                    world.pass_time(0.004)
                case 11 if pick % 3 == 0:
                    world.deliver_all()
                case _:
                    for step in range(1 + pick // 16 % 5):
                        self._lane_step(pick // 16 + step)

    @precondition(lambda self: self.world.network.wires)
    @rule(pick=picks)
    def desk_fails(self, pick: int) -> None:
        """The broker turns a line away, or cannot pass the next connection on; or a worker can
        build no shell."""
        new = [wire for wire in self.world.network.wires if not wire.accepted]
        match pick % 4:
            case 0 | 1 if new:
                self.world.network.tear(new[pick // 4 % len(new)])
            case 2 if self.world.broker is not None:
                self.world.broker.cannot_pass = True
            case 3 if pick // 4 % 8 == 5:
                self.one(pick // 32)[0].broken_shells = True

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

    # --- promises

    @invariant()
    def safe(self) -> None:
        if hasattr(self, "world"):
            type(self).steps += 1
            check(self.world)

    @precondition(lambda self: not self.bad_network)
    @rule()
    def quiet_moment(self) -> None:
        world = self.world
        quiesce(world)
        # A process that keeps a connection for its time slice may learn of the others only after
        # the first of these; it is asked for it by the second.
        for _ in range(2):
            world.pass_time(1.1 * NUDGE_S)
            quiesce(world)
        slots = None if world.broker is None else world.broker.slots
        pools = [] if slots is None else slots.contended.values()
        if any(
            holder.nudge_at > world.now
            for pool in pools
            for holder in pool.asked_to_return.values()
        ):
            world.pass_time(
                NUDGE_LIMIT_S
            )  # it was asked in vain before, and is asked again by then
            quiesce(world)
        for _ in range(
            3 if self._is_moving or any(worker.threads for worker in world.awake) else 0
        ):  # they write another ticket by then
            world.pass_time(0.6)
            quiesce(world)
        serving = world.broker is not None and world.broker.ledger.state == "serving"
        if serving and world.server.up and len(world.awake) == len(world.workers):
            check_nobody_waits_in_vain(world)
            check_nothing_is_kept_back(world)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            type(self).moved += sum(lane.moved for lane in self.world.lanes)
            type(self).passed += self.world.passed
            type(self).lost += self.world.lost
            self.world.in_order = False
            heal(self.world)
            check_nobody_waits_in_vain(self.world)
            let_pass(self.world, 5.0)
            check_lanes_are_empty(self.world)
            check_all_slots_can_be_had(self.world)


class BadNetwork(GoodNetwork):
    """A network that loses, doubles, delays and reorders messages: whatever it does, the promises
    hold."""

    bad_network = True

    @precondition(lambda self: self.world.network.busy or self.world.network.limbo)
    @rule(pick=picks)
    def mislead(self, pick: int) -> None:
        network = self.world.network
        (network.lose, network.double, network.delay, network.late)[pick % 4](pick // 4)

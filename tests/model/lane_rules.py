"""What happens in the lane, where connections move past the broker."""

from __future__ import annotations

from hypothesis.stateful import precondition, rule

from sharedpool.broker.core.handover import TRY_AGAIN_S
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.worker.core.lease import Waiter
from tests.model.lane_threads import LaneGiving, Thread
from tests.model.peace import quiesce
from tests.model.rules import Rules, picks, some
from tests.model.scale import TTL_S
from tests.model.worker import Worker


class LaneRules(Rules):
    """Single steps in the lane, many of them at a time, and deaths in the middle."""

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

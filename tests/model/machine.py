"""What can happen, as rules (`thread_rules.py`, `lane_rules.py`, `fault_rules.py`), and that the
promises hold."""

from __future__ import annotations

from typing import ClassVar

from hypothesis.stateful import initialize, invariant, precondition, rule

from sharedpool.broker.core.handover import NUDGE_LIMIT_S, NUDGE_S
from tests.model.fault_rules import FaultRules
from tests.model.lane_rules import LaneRules
from tests.model.peace import check_all_slots_can_be_had, heal, let_pass, quiesce
from tests.model.promises import (
    check,
    check_lanes_are_empty,
    check_nobody_waits_in_vain,
    check_nothing_is_kept_back,
)
from tests.model.rules import picks
from tests.model.scale import LIMITS
from tests.model.world import World


class GoodNetwork(FaultRules, LaneRules):
    """A network that delivers every message, in order for each session, at its own pace."""

    bad_network = False
    steps: ClassVar[int] = 0
    moved: ClassVar[int] = 0  # connections, in the lane
    passed: ClassVar[int] = 0  # by the broker
    lost: ClassVar[int] = 0  # in a former broker's lane

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

"""Faults stop and everything comes to rest; what can be had then."""

from __future__ import annotations

from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.messages import START_UP_LIMIT_S
from tests.model.broker import Broker
from tests.model.promises import check
from tests.model.scale import BEAT_S, LIMITS, TTL_S
from tests.model.server import Stage
from tests.model.worker import Worker
from tests.model.world import World


def quiesce(world: World) -> None:
    """Everything under way arrives and ends, in almost no time; nobody checks anything in."""
    looks = 0
    for _ in range(200):
        _settle_network(world)
        steps = any([_settle_broker(world), _settle_server(world), _settle_workers(world)])
        check(world)
        broker = world.broker
        if (
            broker is not None
            and world.server.up
            and broker.ledger._leases.quarantine
            and looks < 5
        ):
            # a frozen worker's connection, of which nobody has heard, may keep it occupied for
            # longer
            looks += 1
            world.pass_time(SETTLE_S + 0.001)
        elif not steps and not _moving(world):
            return
    raise AssertionError("no rest")


def _moving(world: World) -> bool:
    if any(
        worker.line.down or worker.readable or worker.wait_socket_news for worker in world.awake
    ):
        return True
    network = world.network
    moving = any(line.up for line in network.lines.values()) or any(
        wire.ready for wire in network.wires
    )
    return world.broker is not None and moving


def _settle_network(world: World) -> None:
    for worker in world.awake:
        worker.notice_line()
    world.deliver_all()


def _settle_broker(world: World) -> bool:
    broker = world.broker
    if broker is None:
        return False
    steps = False
    for session in broker.deaths:
        broker.notice_death(session)
    while broker.calls and world.broker is broker:
        broker.hear_word()
        steps = True
    for token in broker.endings:
        if token in broker.custody and world.broker is broker:
            broker.see(token)
            steps = True
    for pool in broker.lanes_to_read:
        if world.broker is broker and pool in broker.lanes:
            broker.read_lane(pool)
            steps = True
    if world.broker is not broker:
        return True
    waiting = _jobs(broker)
    for pick in range(len(broker.fences) + 3):
        if world.broker is broker:
            broker.work(pick)
    return steps or waiting != _jobs(broker)


def _jobs(broker: Broker) -> list[int]:
    return [len(jobs) for jobs in (broker.fences, broker.looks, broker.doubts, broker.interferes)]


def _settle_server(world: World) -> bool:
    steps = False
    for proc in list(world.server.procs):
        if proc.stage is not Stage.OPEN:
            world.server.advance(proc, Stage.OPEN, world.now)
            steps = True
        if proc.abandoned:
            world.server.end(proc)
            steps = True
    return steps


def _settle_workers(world: World) -> bool:
    """Let each awake worker finish what it has begun; return True if there was something."""
    steps = False
    for worker in world.awake:
        steps |= _settle_lane(worker)
        worker.collect()
        steps |= _settle_connections(worker)
    return steps


def _settle_lane(worker: Worker) -> bool:
    steps = False
    for waiter in list(worker.quitting):
        worker.quit(waiter)
        steps = True
    for thread in list(worker.threads):
        if thread in worker.threads and thread.ready:
            worker.step(thread)
            steps = True
    for giving in list(worker.lane_giving):
        worker.step_giving(giving)
        steps = True
    while worker.woken:
        worker.take_freed_wait_socket()
        steps = True
    if worker.wait_socket_news:
        worker.look_in_lane()
        worker.flush()
        steps = True
    return steps


def _settle_connections(worker: Worker) -> bool:
    steps = False
    for giving in list(worker.giving):
        worker.go_on_giving(giving)
        steps = True
    for closing, conn in list(worker.closing):
        worker.finish_close(closing, conn, seen=True)
        steps = True
    for lease in list(worker.connecting):
        worker.connect(lease)
        steps = True
    for opening in list(worker.opening):
        if opening.proc.dead or opening.proc.stage is Stage.OPEN:
            worker.opened(opening, "")
            steps = True
    return steps


def heal(world: World) -> None:
    """Faults stop: the frozen thaw, the dead are restarted, all that was late
    arrives, time passes."""
    while world.network.limbo:
        world.network.late(0)
    world.server.start()
    if world.broker is not None and world.broker.ledger.state == "draining":
        world.kill_broker(0)
    if world.broker is not None:
        world.broker.fuse = None
    world.start_broker()
    assert world.broker is not None
    world.broker.order(Order(0, OrderKind.RESUME))
    world.broker.restore_limits()
    for worker in world.workers.values():
        worker.frozen = False
    for proc in world.server.procs:
        proc.busy = proc.dirty = False
    let_pass(world, TTL_S + 2 * BEAT_S)
    # What was granted to those who are dead, or gone without a word, on other hosts is free by
    # then.
    world.pass_long(START_UP_LIMIT_S)
    quiesce(world)
    for _ in range(
        20 + sum(len(worker.waiters) + len(worker.threads) for worker in world.workers.values())
    ):
        for worker in list(world.workers.values()):
            worker.beat()
        quiesce(world)
        for worker in list(world.workers.values()):
            for conn in list(worker.users):
                worker.checkin(conn)
        quiesce(world)
        let_pass(world, 1.0)
        if not any(
            worker.waiters or worker.users or worker.threads for worker in world.workers.values()
        ):
            return
    waiting = {
        x.id: (len(x.waiters), len(x.threads))
        for x in world.workers.values()
        if x.waiters or x.threads
    }
    raise AssertionError(f"still waiting although everything was checked in: {waiting}")


def _limit(world: World, name: str) -> int:
    if world.cap is None:
        return LIMITS[name]
    group = world.group_of.get(name, "")
    reserved = sum(terms.reserved for other, terms in world.groups.items() if other != group)
    own = world.groups[group].max_conn if group else None
    return min(LIMITS[name], world.cap - reserved, *([] if own is None else [own]))


def let_pass(world: World, seconds: float) -> None:
    """Time passes, and everything comes to rest again and again."""
    until = world.now + seconds
    while world.now < until:
        quiesce(world)
        world.pass_time(min(BEAT_S / 2, until - world.now))
    quiesce(world)


def check_all_slots_can_be_had(world: World) -> None:
    """L5: one session gets every slot of its pool."""
    broker = world.broker
    assert broker is not None
    for name in LIMITS:
        worker = world.start(name)
        if name == "a":
            # So that it waits in the lane, where there is a hand-over, as in this pool alone.
            quiesce(world)
        count = max(0, _limit(world, name))
        for _ in range(2 * count + 1):
            for _ in range(count - len(worker.users) - len(worker.waiters)):
                worker.checkout(600.0)
            quiesce(world)
            if len(worker.users) >= count:
                break
            world.pass_time(1.0)  # connects failed: a probe a second, perhaps
        held = [
            (str(x.token), x.state.value, x.session.label) for x in broker.slots.leases.values()
        ]
        assert len(worker.users) >= count, (
            f"{len(worker.users)} of {count} slots of {name} can be had: {held}"
        )
        for conn in list(worker.users):
            worker.checkin(conn)
        quiesce(world)

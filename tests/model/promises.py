"""What is promised: S1 to S4 at every moment, the rest when faults have stopped."""

from __future__ import annotations

from collections.abc import Mapping

from sharedpool.broker.core.commands import Entry
from sharedpool.broker.core.demand import excess
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.broker.core.records import Lease
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.messages import START_UP_LIMIT_S
from sharedpool.wire.values import Token
from tests.model.broker import Broker
from tests.model.moving import Thread
from tests.model.scale import BEAT_S, LIMITS, TTL_S
from tests.model.server import Proc, Stage
from tests.model.worker import Worker
from tests.model.world import World


def check(world: World) -> None:
    """S1 to S4."""
    counts = dict.fromkeys(LIMITS, 0)
    for proc in world.server.procs:
        if proc.token in world.excused:
            continue
        if proc.stage is not Stage.QUEUED:
            counts[proc.pool] += 1
        _check_covered(world, proc)
        assert len(proc.workers) <= 1, f"{proc!r} is in the hands of {proc.workers}"
    for name, limit in LIMITS.items():
        assert counts[name] <= limit, (
            f"{counts[name]} backends in pool {name}, limit {limit}: {world.server.procs}"
        )
    if world.cap is not None:
        assert sum(counts.values()) <= world.cap, (
            f"more backends than {world.cap}: {world.server.procs}"
        )
    for group, terms in world.groups.items():
        count = sum(counts[name] for name in LIMITS if world.group_of[name] == group)
        assert terms.max_conn is None or count <= terms.max_conn, (
            f"{count} backends in group {group}"
        )
    hands = [
        thread.hand[1]
        for worker in world.workers.values()
        for thread in worker.threads
        if thread.hand is not None
    ]
    assert len(hands) == len(set(hands)), "two threads have taken one socket"
    assert not any(proc.workers for proc in hands), "a thread has taken a socket that a worker has"
    used = [conn.proc for worker in world.workers.values() for conn in worker.users if conn.works]
    assert len(used) == len(set(used)), "a backend is in two checkouts"
    for worker in world.workers.values():
        _check_worker(worker)
    if world.broker is not None:
        _check_custody(world.broker)


def _check_custody(broker: Broker) -> None:
    """The records say of which leases the broker has the socket, and it is the right one."""
    leases = broker.slots.leases
    for token, proc in broker.custody.items():
        assert leases[token].custody or leases[token].state is SlotState.FENCING, token
        assert leases[token].backend in (None, proc.backend), f"{token} has the socket of {proc!r}"
    for token, lease in leases.items():
        assert not lease.custody or token in broker.custody, f"the socket of {token} is gone"


def _check_covered(world: World, proc: Proc) -> None:
    """A slot is counted as long as its backend lives, or may yet come; with the broker dead, its
    journal tells."""
    broker = world.broker
    if broker is None:
        if not world.journal.intact:
            return
        leases: Mapping[Token, Entry | Lease] = world.journal.live
    elif broker.slots.grant_stop.holding_back:
        return  # nothing is granted before everybody had time to say what they hold
    else:
        leases = broker.slots.leases
    if proc.token not in leases:
        covered = any(lease.backend == proc.backend for lease in leases.values())
        assert covered, f"the slot of {proc!r} is free while it lives"


def _check_worker(worker: Worker) -> None:
    """Every lease has one owner: the cache, a thread, or a close that is under way."""
    cache = worker.cache
    if not cache.leases:
        return
    owners = list(cache.idle)
    owners += [conn.lease for conn in worker.users if conn.lease is not None]
    owners += [closing.lease for closing, _ in worker.closing]
    owners += [giving.closing.lease for giving in worker.giving]
    owners += [
        giving.closing.lease
        for giving in worker.lane_giving
        if cache.leases.get(giving.closing.lease.token) is giving.closing.lease
    ]
    owners += [x.lease for x in worker.quitting if x.lease is not None and x.lease.conn is None]
    owners += [opening.lease for opening in worker.opening]
    owners += worker.connecting
    owners += [
        x.lease
        for x in worker.waiters
        if x.lease is not None and (x.lease.conn is not None or worker.waits_in_lane(x))
    ]
    owners += [x.lease for x in worker.abandoned if x.lease is not None and x.lease.conn is None]
    assert len(owners) == len(set(owners)), f"{worker}: a lease has two owners"
    for lease in cache.leases.values():
        assert lease in owners, f"{worker}: lease {lease.token} ({lease.phase.value}) is nobody's"


# --- peace


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


def check_nobody_waits_in_vain(world: World) -> None:
    """L1, L4, in a quiet moment without frozen workers, a serving broker and a
    server that is up."""
    broker = world.broker
    assert broker is not None
    slots = broker.slots
    # A holder that was killed on another host is waited for, for a moment.
    deaf = any(
        not session.silent and id not in world.workers for id, session in slots.sessions.items()
    )
    for worker in world.workers.values():
        for thread in worker.threads:
            if thread.waiter is None or thread.waiter.waits_for_move:
                _check_lane(world, broker, worker, thread)
        for waiter in worker.waiters:
            if waiter.waits_for_move or waiter in worker.abandoned:
                continue
            assert waiter.lease is None
            own = slots.sessions.get(worker.id)
            if not worker.established or own is None or own.silent or own.restored:
                # it has not noticed yet that its broker is another, or that it was given up
                continue
            assert deaf or worker.patience[waiter.request], (
                "a caller that does not wait has no answer"
            )
            if waiter.request in own.granted:
                # overtaken by a newer one after a HELLO, it counts as lost: the next heartbeat
                # tells
                continue
            assert broker.queued(worker.id, waiter.request), "a waiter that is in no queue"
            pool = slots.pools[worker.pool]
            assert pool.room <= 0 or slots.available(pool) <= 0, "a waiter and a free slot"
            capped = slots.room <= 0
            for other in world.workers.values():
                known = slots.sessions.get(other.id)
                if known is None or known.silent:
                    continue  # it has not spoken for longer than the TTL
                others = slots.pools[other.pool]
                if (
                    slots.groups
                ):  # a pool of higher priority reports its idle leases with the next heartbeat
                    reaches = slots.serves(others, pool) and others.priority <= pool.priority
                else:
                    reaches = capped and pool.room > 0
                if others is pool or reaches:
                    idle = [lease for lease in other.cache.idle if lease.token in slots.leases]
                    assert not idle, f"{worker} waits, and {other} has {idle} idle"


def _check_lane(world: World, broker: Broker, worker: Worker, thread: Thread) -> None:
    slots, end = broker.slots, thread.wait_socket.end
    own = slots.sessions.get(worker.id)
    if not worker.established or own is None or own.silent or own.restored:
        return
    assert worker.end is end, f"{worker} waits in a lane that it has left"
    assert worker.pool in broker.lanes, f"{worker} waits in a former broker's lane"
    lane, pool = end.lane, slots.pools[worker.pool]
    assert lane is broker.lanes[worker.pool].lane, f"{worker} waits in a former lane"
    assert lane.board.moving, f"{worker} waits in the lane although it is halted"
    assert not lane.shelf, f"{worker} waits, and something is on the shelf"
    assert pool.room <= 0 or slots.available(pool) <= 0, (
        f"{worker} waits in the lane, and a slot is free"
    )
    for other in world.workers.values():
        known = slots.sessions.get(other.id)
        if other.pool == worker.pool and known is not None and not known.silent:
            idle = [lease.token for lease in other.cache.idle if lease.token in slots.leases]
            assert not idle, f"{worker} waits in the lane, and {other} has {idle} idle"


def check_lanes_are_empty(world: World) -> None:
    """When nobody has wanted anything for a while: nothing is left in a lane."""
    for lane in world.lanes:
        assert not lane.lying, f"{lane.lying} are left in a lane of broker {lane.epoch}"


def check_nothing_is_kept_back(world: World) -> None:
    """In such a moment: what an operator wants back lies idle nowhere."""
    broker = world.broker
    assert broker is not None
    slots = broker.slots
    for pool in slots.shrinking.values():
        if excess(slots, pool) > 0:
            assert not pool.parked, f"{pool.name}: an operator wants back what is parked"
            for worker in world.workers.values():
                known = slots.sessions.get(worker.id)
                if worker.pool == pool.name and known is not None and not known.silent:
                    idle = [lease for lease in worker.cache.idle if lease.token in slots.leases]
                    assert not idle, f"{worker}: an operator wants back what lies idle"


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

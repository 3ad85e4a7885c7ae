"""What is promised: S1 to S4 at every moment, the rest when faults have stopped."""

from __future__ import annotations

from collections.abc import Mapping

from sharedpool.broker.core.commands import Entry
from sharedpool.broker.core.demand import excess
from sharedpool.broker.core.records import Lease
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.values import Token
from tests.model.broker import Broker
from tests.model.lane_threads import Thread
from tests.model.scale import LIMITS
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

"""How many slots are wanted, and whose slots would help: the arithmetic behind each decision.

Functions of the records alone: they change nothing. A waiter is *patient* if it wants to wait
(`timeout` above 0); the others are refused as soon as every holder has nothing idle.
"""

from __future__ import annotations

from sharedpool.broker.core.records import Pool, Session, Waiter
from sharedpool.broker.core.slots import Slots


def patient(pool: Pool) -> int:
    """Return how many patient waiters a pool has; none count while the pool is paused."""
    return 0 if pool.paused else len(pool.waiters) - len(pool.nowaits)


def shortage(pool: Pool) -> int:
    """Return how many waiters a pool has beyond its free slots and the slots on their way back."""
    return 0 if pool.paused else len(pool.waiters) - max(pool.room, 0) - pool.coming


def shortage_of_cap(slots: Slots) -> int:
    """Return how many waiters only the cap over all pools keeps waiting, with no slot coming."""
    servable = sum(min(len(pool.waiters), max(pool.room, 0)) for pool in slots.contended.values())
    if not servable:
        return 0  # their own pools' limits keep them waiting
    return servable - slots.room - sum(pool.coming for pool in slots.pools.values())


def excess(slots: Slots, pool: Pool) -> int:
    """Return how many more slots of a pool an operator's order takes back, beyond those coming.

    The pool was paused, or its limit, its group's or the cap was lowered. What one session was
    told to give back (`Session.draining`) does not count here.
    """
    if pool.name not in slots.shrinking:
        return 0
    too_many = max(len(pool.leases) - pool.target - pool.coming, 0)
    group = pool.group
    if group is not None and group.room < 0:
        too_many = max(too_many, -group.room - sum(other.coming for other in group.pools))
    if (overdrawn := slots.overdrawn) and slots.is_beyond_reservation(pool):
        givers = filter(slots.is_beyond_reservation, slots.pools.values())
        too_many = max(too_many, overdrawn - sum(giver.coming for giver in givers))
    return too_many


def pools_served_by(slots: Slots, pool: Pool) -> list[Pool]:
    """Return the pools whose waiters a slot of this pool would serve: its own, and others' too
    where the cap over all pools or a group's limit is exhausted.
    """
    if not slots.groups:
        if slots.max_conn is None or slots.room > 0:
            return [pool]
        others = (other for other in slots.contended.values() if other is not pool)
        return [pool, *(other for other in others if other.room > 0)]
    # Users are never asked on behalf of a less important group.
    others = (other for other in slots.contended.values() if other.priority >= pool.priority)
    return [pool, *(other for other in others if slots.serves(pool, other))]


def slots_wanted(slots: Slots, pool: Pool) -> int:
    """Return how many slots of a pool are wanted back, by patient waiters or by an operator."""
    return sum(map(patient, pools_served_by(slots, pool))) + excess(slots, pool)


def first_patient(slots: Slots, pool: Pool) -> Waiter | None:
    """Return the patient waiter that would get a slot of this pool."""
    first: Waiter | None = None
    for other in pools_served_by(slots, pool):
        if other.paused or len(other.waiters) == len(other.nowaits):
            continue
        waiters = other.waiters.values()
        head = next(w for w in waiters if not w.nowait) if other.nowaits else next(iter(waiters))
        if first is None or slots.rank(head) < slots.rank(first):
            first = head
    return first


def returns_wanted(slots: Slots, pool: Pool, holder: Session) -> int:
    """Return how many of a holder's next checkins are wanted back.

    None while the first waiter is the holder's own: its next checkin serves that waiter locally.
    """
    if not (slots.contended or slots.shrinking):
        return 0
    first = first_patient(slots, pool)
    if first is not None and first.session is holder:
        return excess(slots, pool)
    return slots_wanted(slots, pool)


def has_room(slots: Slots, pool: Pool) -> bool:
    """Return True if a slot is free, nobody waits for it, and no parked connection can serve."""
    if slots.grant_stop.active or slots.contended or pool.parked:
        return False
    return not pool.paused and pool.room > 0 and slots.available(pool) > 0


def grants_at_once(slots: Slots, session: Session) -> bool:
    """Return True if a request would not stay in the queue: `schedule` would only grant it."""
    return session.refusal is None and not slots.shrinking and has_room(slots, session.pool)


def only_checkins_help(slots: Slots, pool: Pool) -> bool:
    """Return True if nothing can be done for a pool's waiters but wait for a checkin.

    The usual state while many processes share one pool. Tests what `schedule` would look at,
    without its loops.
    """
    return not (
        pool.parked
        or pool.idle
        or pool.suspects
        or (pool.not_asked_to_return and not pool.moving)
        or pool.nowaits
        or slots.grant_stop.active
        or pool.backoff.active
        or slots.shrinking
        or slots.groups
        or len(slots.pools) > 1
        or len(pool.leases) < min(pool.max_conn, pool.allowed)
    )


def waiting_in_lane(pool: Pool) -> int:
    """Return how many threads wait in a pool's lane, by the board."""
    return 0 if pool.lane is None else pool.lane.board.waiting(pool.lane.indices)

"""What must always hold of the records; checked by tests after each step."""

from __future__ import annotations

from sharedpool.broker.core.records import Pool
from sharedpool.broker.core.slot_states import CLOSING, FENCING, FREE, GRANTED, OPEN, SUSPECT
from sharedpool.broker.core.slots import Slots


def check_records(slots: Slots) -> None:
    """Raise `AssertionError` if the records contradict each other."""
    for token, lease in slots.leases.items():
        assert lease.token == token
        assert lease.state is not FREE, lease
        assert lease.pool.leases[token] is lease.session.leases[token] is lease
        assert lease.session.pool is lease.pool
    assert len(slots.leases) == sum(len(pool.leases) for pool in slots.pools.values())
    assert len(slots.leases) == sum(len(session.leases) for session in slots.sessions.values())
    for pool in slots.pools.values():
        _check_leases(pool)
        _check_sessions(slots, pool)
        _check_queue(slots, pool)
        _check_lane(pool)
        assert pool.name in slots.shrinking or not pool.paused


def check_limits(slots: Slots, epoch: int) -> None:
    """Raise `AssertionError` if more is held than the limits allow, and nobody asks for it back."""
    # Leases that were claimed, or restored, may exceed the limits.
    claimed = sum(
        token.epoch != epoch or not lease.session.pid for token, lease in slots.leases.items()
    )
    for pool in slots.pools.values():
        assert len(pool.leases) <= pool.max_conn + claimed or pool.name in slots.shrinking
    if slots.max_conn is not None and not slots.shrinking:
        assert len(slots.leases) <= slots.max_conn + claimed
        slots.groups.check_invariants(slots.room + claimed)


def _check_leases(pool: Pool) -> None:
    for token, lease in pool.incoming.items():
        assert lease.state in (CLOSING, FENCING)
        assert pool.leases[token] is lease
    suspects = {token for token, lease in pool.leases.items() if lease.state is SUSPECT}
    assert suspects == set(pool.suspects)
    for lease in pool.idle.values():
        assert lease.state is OPEN
        assert lease.idle_since is not None
        assert not lease.session.silent


def _check_sessions(slots: Slots, pool: Pool) -> None:
    for session in pool.sessions.values():
        assert slots.sessions[session.id] is session
        for lease in session.granted.values():
            assert lease.state in (GRANTED, SUSPECT)
            assert lease.backend is None
        answers = session.silent or session.awaited or session.answered >= session.asked
        assert answers, session.label
        assert not session.taking or session.awaited, session.label
        assert session.draining <= set(session.leases)
    assert pool.taking == sum(session.taking for session in pool.sessions.values())
    holders = {s.id for s in pool.sessions.values() if s.leases and not s.silent}
    assert holders == set(pool.asked_to_return) | set(pool.not_asked_to_return)
    assert not set(pool.asked_to_return) & set(pool.not_asked_to_return)
    assert all(session.returns_due > 0 for session in pool.asked_to_return.values())
    assert all(session.returns_due == 0 for session in pool.not_asked_to_return.values())


def _check_queue(slots: Slots, pool: Pool) -> None:
    assert (pool.name in slots.contended) == bool(pool.waiters)
    assert set(pool.nowaits) == {seq for seq, waiter in pool.waiters.items() if waiter.nowait}
    for seq, waiter in pool.waiters.items():
        assert waiter.seq == seq
        assert slots.sessions[waiter.session.id].waiters[waiter.request] is waiter


def _check_lane(pool: Pool) -> None:
    on_board = [lease for lease in pool.leases.values() if lease.cell >= 0]
    lane = pool.lane
    if lane is None:
        assert not on_board
        return
    cells = {lease.cell for lease in on_board}
    assert lane.used == len(on_board) == len(cells)
    assert not set(lane.free) & cells
    assert all(lane.board.has(lease.cell, lease.token) for lease in on_board)
    assert all(session.member_number == number for number, session in lane.members.items())
    assert lane.moving == lane.board.moving

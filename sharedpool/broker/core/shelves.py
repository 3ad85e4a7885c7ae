"""The shelves of the pools' lanes, as the broker records them. Pure: no I/O, no clock.

A lane has a queue of waiting threads and a *shelf* of connections that nobody holds. The records
count such a lease for a session of its own, the pool's shelf session. A connection gets there when
a worker gives it while nobody waits, or when its holder died while it moved.
"""

from __future__ import annotations

from sharedpool.broker.core.commands import GiveInLane
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.leases import LONGEST_MS
from sharedpool.broker.core.records import Lease, Pool, Session
from sharedpool.broker.core.slot_states import OPEN
from sharedpool.wire.desk import Live, Moved


class Shelves:
    """The shelf sessions of all pools.

    Nothing expires on a shelf while connections move. Moves halt within two seconds when no thread
    asks (`Moves.quiet_due`). The broker then takes what is on the shelf and parks it, and ends what
    has been parked for `expiration_s`.
    """

    def __init__(self, context: Context, expiration_s: float) -> None:
        self._slots = context.slots
        self._emit = context.emit
        self._expiration_s = expiration_s
        self._pools: dict[str, Pool] = {}  # the pools that have a shelf session

    def of(self, pool: Pool) -> Session:
        """Return a pool's shelf session; make it if there is none."""
        if pool.shelf is None:
            expiration_s = min(self._expiration_s, min(pool.spec.expiration_ms, LONGEST_MS) / 1000)
            session_id = b"shelf:" + pool.name.encode()
            shelf = Session(session_id, 0, "", "", pool, expiration_s, 0.0, shelf=True)
            self._slots.sessions[shelf.id] = pool.sessions[shelf.id] = pool.shelf = shelf
            self._pools[pool.name] = pool
        return pool.shelf

    def pools(self) -> list[Pool]:
        """Return the pools that have a shelf session."""
        return list(self._pools.values())

    def pool_discarded(self, pool: Pool) -> None:
        """Forget a pool that no worker uses any more."""
        self._pools.pop(pool.name, None)

    def give(self, lease: Lease, live: Live, now: float) -> None:
        """Put a connection that was given to the broker on the shelf: no request waits here."""
        self._slots.transfer(lease, self.of(lease.pool))
        lease.unconfirmed, lease.unconfirmed_since = True, now
        if lease.cell < 0:
            self._slots.enter_on_board(lease)
        self._emit(GiveInLane(lease.pool.name, lease.token, lease.cell, live))

    @staticmethod
    def found(pool: Pool, moved: Moved) -> Lease | None:
        """Return the lease of a connection found on the shelf, None if it must not be passed on."""
        lease = pool.leases.get(moved.token)
        if lease is None or lease.state is not OPEN:
            return None
        if not lease.session.shelf or lease.live is not None:
            return None
        lease.unconfirmed = False
        return lease

    @staticmethod
    def emptied(pool: Pool, now: float) -> None:
        """Record that the broker has found nothing more on a pool's shelf."""
        if pool.lane is not None:
            pool.lane.emptied_at = now


def on_shelf(pool: Pool) -> int:
    """Return how many connections lie on a pool's shelf, by the records: as good as idle.

    A lease that was there before the broker last found the shelf empty is not counted: it is lost,
    or on its way.
    """
    if pool.shelf is None or pool.lane is None:
        return 0
    emptied_at = pool.lane.emptied_at
    return sum(
        lease.state is OPEN and lease.live is None and lease.unconfirmed_since > emptied_at
        for lease in pool.shelf.leases.values()
    )

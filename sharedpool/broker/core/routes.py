"""How connections reach the server: directly, by a proxy, or by a pooler. Pure: no I/O, no clock.

Workers report it for each connection, and the control connection for its own.

- *Direct*: the end of a connection's socket is its backend's end. A connection that its worker has
  not described yet is judged by the others of its pool.
- A *pooler that keeps sessions* gives a backend to one lease after another, without an end.
- A *pooler that does not keep sessions* shows by two connections that have the same backend at the
  same time. It makes a pool *unsuitable*: session state would be lost, and no backend belongs to
  one lease.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharedpool.broker.core.records import Lease, Pool, Session
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.values import Backend


def sessions_not_kept_text(sign: str) -> str:
    """Return the error about a pooler that does not keep sessions; `sign` is what shows it."""
    return (
        f"the server is reached through a pooler that does not keep sessions ({sign}; PgBouncer in"
        " transaction or statement mode does so): connect to PostgreSQL itself, or to a pooler in"
        " session mode"
    )


@dataclass(slots=True)
class _Twins:
    """Two leases that seem to have one backend.

    The report that one of them is closed may be on its way, so both workers are asked.
    """

    leases: list[Lease]
    asked: list[int]  # the recall that each worker is to answer; 0: it has, and its lease is open


class Routes:
    """What one broker knows about the routes of its pools."""

    def __init__(self, server: str, *, has_control_connection: bool) -> None:
        """`server` is the part of a server's description that names the control connection's."""
        self._server = server
        self._has_control_connection = has_control_connection
        self.control_is_direct = False
        self._fault = ""  # what makes the control connection's route unsuitable
        self._lent: dict[Backend, Lease] = {}  # the lease that a pooler has given a backend last
        self._twins: list[_Twins] = []
        # Leases whose connections have ended; a later report may tell whether that proves anything.
        self.unproven: set[Lease] = set()

    # --- direct connections

    def reached(self, *, direct: bool, fault: str) -> None:
        """Record the control connection's route; `fault` is what makes it unsuitable."""
        self.control_is_direct, self._fault = direct, fault

    def believes(self, lease: Lease) -> bool:
        """Return True if the end of a lease's connection is its backend's end."""
        return self.is_direct(lease.pool) if lease.backend is None else lease.backend.direct

    def believes_refusal(self, lease: Lease) -> bool:
        """Return True if the end of a lease's failed connect proves that it has no backend.

        Without a control connection, and where no proxy was met, the server is taken to have
        refused it: otherwise the slot would be lost.
        """
        return self.believes(lease) or (
            lease.backend is None and lease.pool.direct is None and not self._has_control_connection
        )

    def is_direct(self, pool: Pool) -> bool:
        """Return True if nothing is known to be between a pool's workers and the server."""
        return pool.direct is True or (
            pool.direct is None and self.control_is_direct and self._is_same(pool)
        )

    def _is_same(self, pool: Pool) -> bool:
        return self._server in pool.spec.server

    def unsuitable(self, pool: Pool) -> str:
        """Return what makes a pool's server unsuitable; empty if nothing does."""
        return pool.unsuitable or (self._fault if self._fault and self._is_same(pool) else "")

    # --- poolers

    def lend(self, lease: Lease, backend: Backend) -> Lease | None:
        """Record which lease a pooler has given a backend; return the lease that had it before."""
        if backend.pooled is None or not backend.start_us:
            return None
        other, self._lent[backend] = self._lent.get(backend), lease
        return None if other is lease else other

    def is_lent_again(self, lease: Lease) -> bool:
        """Return True if a pooler has given a lease's backend to another lease since."""
        backend = lease.backend
        return backend is not None and self._lent.get(backend, lease) is not lease

    def over(self, lease: Lease) -> None:
        """Forget a lease that is over."""
        self.unproven.discard(lease)
        if self._lent and lease.backend is not None and self._lent.get(lease.backend) is lease:
            del self._lent[lease.backend]

    def suspect_twins(self, leases: list[Lease], asked: list[int]) -> None:
        """Record two open leases that seem to have one backend, and the recalls that ask."""
        self._twins.append(_Twins(leases, asked))

    def answered(self, session: Session, serial: int) -> Lease | None:
        """Handle a session's list of leases, which answers recall `serial`.

        Return a lease whose backend another lease has at the same time: both workers have answered,
        and both leases are still open.
        """
        if not self._twins:
            return None
        self._twins = [
            pair
            for pair in self._twins
            if all(lease.state is SlotState.OPEN for lease in pair.leases)
        ]
        for pair in self._twins:
            for index, lease in enumerate(pair.leases):
                if lease.session is session and serial >= pair.asked[index]:
                    pair.asked[index] = 0
            if not any(pair.asked):
                self._twins.remove(pair)
                return pair.leases[0]
        return None

"""How workers reach the server, as their connections and the control connection have found out. Pure: no I/O, no clock.

Where nobody is in between (a *direct* connection), the end of a connection's socket is its backend's end. Of one whose
worker has not said yet how it is, others of its pool tell. Behind a pooler that keeps sessions, a backend goes from one
lease to another without an end. A pooler that does not keep them (two connections that are open at the same time have
the same backend) makes a pool *unsuitable*: no session state would be what its user has set, and no backend is one
lease's.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharedpool.broker.core.records import Lease, Pool, Session, SlotState
from sharedpool.wire.messages import Backend


def sessions_not_kept_text(sign: str) -> str:
    """Return what is said of a pooler that does not keep sessions."""
    return (
        f"the server is reached through a pooler that does not keep sessions ({sign}; PgBouncer in transaction or"
        " statement mode does so): connect to PostgreSQL itself, or to a pooler in session mode"
    )


@dataclass(slots=True)
class _Twins:
    """Two leases that seem to have one backend; the recall by which each is asked whether it is still open, 0: it is.

    The news that one of them is closed may be on its way.
    """

    leases: list[Lease]
    asked: list[int]


class Routes:
    """One broker's. `server`: what the description of a pool's server contains if the control connection goes there
    too, by the same address. `has_control_connection`: there is a control connection.
    """

    def __init__(self, server: str, *, has_control_connection: bool) -> None:
        self._server = server
        self._has_control_connection = has_control_connection
        self.control_is_direct = False
        self._fault = ""  # of the control connection's way
        self._lent: dict[Backend, Lease] = {}  # by a pooler: to whom last
        self._twins: list[_Twins] = []
        # Their connections have ended, and what that proves their workers may say, or others.
        self.unproven: set[Lease] = set()

    # --- nobody in between?

    def reached(self, *, direct: bool, fault: str) -> None:
        """Note how the control connection reaches the server, and what makes that way unsuitable, if anything."""
        self.control_is_direct, self._fault = direct, fault

    def believes(self, lease: Lease) -> bool:
        """Say whether the end of a lease's connection is its backend's end. Of one not described yet others tell."""
        return self.is_direct(lease.pool) if lease.backend is None else lease.backend.direct

    def believes_refusal(self, lease: Lease) -> bool:
        """The same of a connect that has failed.

        Where nobody can be asked, and no proxy has been met, the server itself has refused: else its slot were lost.
        """
        return self.believes(lease) or (
            lease.backend is None and lease.pool.direct is None and not self._has_control_connection
        )

    def is_direct(self, pool: Pool) -> bool:
        """Say whether it is known that nobody is between a pool's workers and the server."""
        return pool.direct is True or (
            pool.direct is None and self.control_is_direct and self._is_same(pool)
        )

    def _is_same(self, pool: Pool) -> bool:
        return self._server in pool.spec.server

    def unsuitable(self, pool: Pool) -> str:
        """Say what makes a pool's server unsuitable, if anything does."""
        return pool.unsuitable or (self._fault if self._fault and self._is_same(pool) else "")

    # --- poolers

    def lend(self, lease: Lease, backend: Backend) -> Lease | None:
        """Note that a pooler has lent a backend to a lease; return who had it before, if that is not over."""
        if backend.pooled is None or not backend.start_us:
            return None
        other, self._lent[backend] = self._lent.get(backend), lease
        return None if other is lease else other

    def is_lent_again(self, lease: Lease) -> bool:
        """Say whether a lease's backend is another lease's by now."""
        backend = lease.backend
        return backend is not None and self._lent.get(backend, lease) is not lease

    def over(self, lease: Lease) -> None:
        """Note that a lease is over."""
        self.unproven.discard(lease)
        if self._lent and lease.backend is not None and self._lent.get(lease.backend) is lease:
            del self._lent[lease.backend]

    def suspect_twins(self, leases: list[Lease], asked: list[int]) -> None:
        """Note that two open leases seem to have one backend, and by which recalls their workers are asked."""
        self._twins.append(_Twins(leases, asked))

    def answered(self, session: Session, serial: int) -> Lease | None:
        """Take in that a session has said what it holds, knowing recall `serial`: what is over is not OPEN any more.

        Return a lease whose backend another one has at the same time: its pooler does not keep sessions.
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

"""What an operator orders: pause and resume, a new limit, a process's or one lease's connection back.

All are idempotent, and each says what it did. They hold until this broker ends; a later one begins without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.denials import Denials
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import Pool
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.admin import Done, Order, OrderKind
from sharedpool.wire.messages import DenyReason, Token


class OrderError(Exception):
    """The order cannot be carried out; the text says why."""


class Admin:
    """The operator's side of the ledger. A pool's name "" stands for all pools, those to come included."""

    def __init__(
        self,
        context: Context,
        recalls: Recalls,
        leases: Leases,
        handover: Handover,
        denials: Denials,
        begin_generation: Callable[[Pool, str], None],
    ) -> None:
        self._slots = context.slots
        self._recalls = recalls
        self._leases = leases
        self._handover = handover
        self._denials = denials
        self._begin_generation = begin_generation
        self._has_control_connection = context.has_control_connection
        self._configured: set[str] = set()  # pools whose limits came with `configure`

    def carry_out(self, order: Order, now: float) -> Done:
        """Do what is ordered; return what was done, or why it cannot be."""
        try:
            match order.kind:
                case OrderKind.PAUSE:
                    said = self.pause(order.pool, now)
                case OrderKind.RESUME:
                    said = self.resume(order.pool)
                case OrderKind.LIMIT:
                    said = self.limit(order.pool, order.number)
                case OrderKind.DRAIN:
                    said = self.drain(order.number, now)
                case OrderKind.KILL:
                    said = self.kill(order.token, now)
                case OrderKind.RECONNECT:
                    said = self.reconnect(order.pool, now)
        except OrderError as error:
            return Done([], str(error))
        return Done(said)

    def pause(self, name: str, now: float) -> list[str]:
        """Lend nothing any more and have everything brought back; who waits goes on waiting."""
        pools = self._pools(name)
        already = {pool.name for pool in pools if pool.paused}
        self._slots.paused_pools.add(name)
        said = []
        for pool in pools:
            self._slots.shrink(pool)
            for waiter in list(pool.nowaits.values()):
                self._denials.deny(waiter, DenyReason.PAUSED, now)
            how = "was paused already" if pool.name in already else "paused"
            said.append(
                f"pool {pool.name!r} {how}: {_count(pool)} to come back, {len(pool.waiters)} waiting"
            )
        return said or ["paused, and not in use"]

    def resume(self, name: str) -> list[str]:
        """Lend again."""
        slots, pools = self._slots, self._pools(name)
        held = [pool for pool in pools if pool.paused]
        paused = set(slots.paused_pools)
        if not name:
            slots.paused_pools.clear()
        elif "" in slots.paused_pools:
            raise OrderError("all pools are paused: resume them all")
        else:
            slots.paused_pools.discard(name)
        for pool in held:
            slots.shrink(pool)
        said = [f"pool {pool.name!r} resumed: {len(pool.waiters)} waiting" for pool in held]
        return said or [
            "resumed, and not in use" if slots.paused_pools != paused else "it was not paused"
        ]

    def limit(self, name: str, max_conn: int) -> list[str]:
        """Set a pool's limit, or ("") that over all pools; what is beyond it comes back as it becomes free."""
        slots, pools = self._slots, self._pools(name)
        if not name:
            if slots.max_conn is None:
                raise OrderError(
                    "this broker has no limit over all pools, only the pools' own: name one with --pool"
                )
            if max_conn < slots.groups.reserved:
                raise OrderError(
                    f"{slots.groups.reserved} connections are reserved for groups: no less can be allowed"
                )
            before, slots.max_conn = slots.max_conn, max_conn
            said = [
                f"limit over all pools: {before} before, {max_conn} now, {len(slots.leases)} in use"
            ]
        else:
            slots.limits[name] = max_conn
            said = []
        for pool in pools:
            before, pool.max_conn = pool.max_conn, slots.limit(pool.name, pool.spec)
            slots.shrink(pool)
            if name:
                said.append(
                    f"pool {name!r}: limit {before} before, {pool.max_conn} now, {len(pool.leases)} in use"
                )
                if pool.max_conn < max_conn:
                    said.append(f"no more than {slots.max_conn} are allowed over all pools")
        return said or [f"pool {name!r}: limit {max_conn} when it is used again"]

    def configure(
        self, max_conn: int | None, groups: dict[str, GroupTerms], limits: dict[str, int]
    ) -> None:
        """Have these terms in place of those of the last time; what is beyond them comes back as it becomes free."""
        slots = self._slots
        slots.max_conn = max_conn
        for name in self._configured - limits.keys():
            slots.limits.pop(name, None)
        self._configured = set(limits)
        slots.limits.update(limits)
        for pool in slots.pools.values():
            pool.max_conn = slots.limit(pool.name, pool.spec)
        slots.configure(groups)

    def drain(self, pid: int, now: float) -> list[str]:
        """Have a process give back all that it holds now: what lies idle at once, what is in use at its checkin."""
        sessions = [s for s in self._slots.sessions.values() if s.pid == pid and not s.ended]
        if not sessions:
            raise OrderError(f"no process {pid} uses this broker (see `sharedpool status`)")
        said = []
        for session in sessions:
            pool = session.pool
            wanted = [
                x
                for x in session.leases.values()
                if x.live is None and x.state is not SlotState.FENCING
            ]
            idle = [lease for lease in wanted if pool.idle.pop(lease.token, None) is not None]
            if wanted and not session.silent:
                session.draining.update(lease.token for lease in wanted)
                self._slots.shrinking[pool.name] = pool
                self._slots.mark_returns_due(session, 0)  # as much as the debts
                self._slots.mark_taking(session, session.taking + len(idle))
                self._recalls.send(session, now, take=len(idle))
            said.append(
                f"{session.label} in pool {pool.name!r}: {len(wanted)} to come back"
                + (
                    ", but it is silent: they are ended when somebody waits for them"
                    if session.silent
                    else ""
                )
            )
        return said

    def kill(self, token: Token, now: float) -> list[str]:
        """End one lease's connection, whatever it is doing; its slot is free once its backend is seen to be gone."""
        lease = self._slots.leases.get(token)
        if lease is None:
            return [f"lease {token} is over"]
        whose = f"lease {token} of {lease.session.label}"
        if not lease.findable and (lease.session.suspect or lease.session.ended):
            if not self._has_control_connection:
                # Nothing to end, and nobody to ask. An operator knows that its worker is gone, if this cannot see it.
                self._leases.free(lease, "freed by an operator")
                return [f"{whose} had no connection that is known of: its slot is free"]
            if lease.state is not SlotState.FENCING:
                self._leases.fence(lease, "ended by an operator", now)
            return [
                f"{whose} has no connection that is known of: its slot is free once the server shows none either"
            ]
        if lease.state is SlotState.FENCING:
            return [f"lease {token} is being ended already"]
        if not lease.findable:
            raise OrderError(
                f"lease {token} has no connection yet, and its worker is there: try again"
            )
        if not (self._has_control_connection or lease.custody):
            raise OrderError(
                f"lease {token} cannot be ended from here: the broker has no control connection (--dsn)"
            )
        self._leases.end(lease, "ended by an operator", now)
        pid = f" (backend {lease.backend.pid})" if lease.backend is not None else ""
        return [
            f"lease {token} of {lease.session.label} in pool {lease.pool.name!r}{pid} is being ended"
        ]

    def reconnect(self, name: str, now: float) -> list[str]:
        """Begin a new generation: what is open now is replaced at its next checkout or checkin."""
        said = []
        for pool in self._pools(name):
            self._begin_generation(pool, "asked for by `sharedpool reconnect`")
            said.append(
                f"pool {pool.name!r}: generation {pool.generation}: {len(pool.leases)} connections are replaced at"
                " their next checkout or checkin"
            )
            self._handover.end_parked(
                [pool], len(pool.parked), now
            )  # nobody else would replace them
        return said or ["no pool is in use: nothing to replace"]

    def _pools(self, name: str) -> list[Pool]:
        slots = self._slots
        pools: Iterable[Pool] = slots.pools.values()
        if (
            name
            and name not in slots.pools
            and name not in slots.limits
            and name not in slots.paused_pools
        ):
            known = ", ".join(repr(pool.name) for pool in pools) or "none"
            raise OrderError(f"no pool {name!r} at this broker; there are: {known}")
        return [pool for pool in pools if name in ("", pool.name)]


def _count(pool: Pool) -> str:
    return f"{len(pool.leases)} connection" + ("" if len(pool.leases) == 1 else "s")

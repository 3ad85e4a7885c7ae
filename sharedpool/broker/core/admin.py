"""Operators' orders: pause, resume, limit, drain, kill and reconnect.

Each order may be repeated without harm, and answers with lines that say what it did. Orders hold
until this broker ends; a later one begins without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.denials import Denials
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import Lease, Pool, Session
from sharedpool.broker.core.share_terms import ShareChange
from sharedpool.broker.core.sharing import Sharing
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.admin import Done, Order, OrderKind
from sharedpool.wire.messages import DenyReason
from sharedpool.wire.values import Token


class OrderError(Exception):
    """An order that cannot be carried out; the text says why."""


class Admin:
    """Carries out operators' orders. The name "" stands for all pools, also those to come."""

    def __init__(
        self,
        context: Context,
        recalls: Recalls,
        leases: Leases,
        handover: Handover,
        denials: Denials,
        begin_generation: Callable[[Pool, str], None],
        sharing: Sharing,
    ) -> None:
        self._sharing = sharing
        self._slots = context.slots
        self._recalls = recalls
        self._leases = leases
        self._handover = handover
        self._denials = denials
        self._begin_generation = begin_generation
        self._has_control_connection = context.has_control_connection
        self._configured: set[str] = set()  # pools whose limits came with `configure`

    def carry_out(self, order: Order, now: float) -> Done:
        """Carry out an order; return what was done, or why it cannot be."""
        try:
            match order.kind:
                case OrderKind.PAUSE | OrderKind.RESUME | OrderKind.LIMIT if order.all_hosts:
                    said = self._order_all_hosts(order)
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

    def _order_all_hosts(self, order: Order) -> list[str]:
        """Have the brokers of all hosts do it; this one does it with its next sync."""
        if order.kind is OrderKind.LIMIT:
            change = ShareChange(max_conn=order.number)
        else:
            change = ShareChange(paused=order.kind is OrderKind.PAUSE)
        if not (said := self._sharing.change(self._pools(order.pool), change)):
            raise OrderError("no limit here is shared with other hosts at present")
        return said

    def set_paused(self, name: str, paused: bool, now: float) -> None:
        """Pause or resume a pool as an operator of some host has ordered for all."""
        if paused:
            self.pause(name, now)
        else:
            self._slots.paused_pools.discard(name)
            for pool in self._slots.pools.values():
                self._slots.shrink(pool)

    def pause(self, name: str, now: float) -> list[str]:
        """Grant nothing any more, and take everything back; patient waiters go on waiting."""
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
                f"pool {pool.name!r} {how}: {_count(pool)} to come back,"
                f" {len(pool.waiters)} waiting"
            )
        return said or ["paused, and not in use"]

    def resume(self, name: str) -> list[str]:
        """Grant again."""
        slots, pools = self._slots, self._pools(name)
        if any(map(self._sharing.is_paused, pools)):
            raise OrderError("paused on all hosts: resume with --all-hosts")
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
        """Set a pool's limit, or that over all pools; the excess comes back as it becomes free."""
        pools = self._pools(name)
        return self._limit_pool(name, pools, max_conn) if name else self._limit_all(pools, max_conn)

    def _limit_all(self, pools: list[Pool], max_conn: int) -> list[str]:
        slots = self._slots
        if slots.max_conn is None:
            raise OrderError(
                "this broker has no limit over all pools, only the pools' own: name one with --pool"
            )
        if max_conn < (reserved := slots.groups.reserved):
            raise OrderError(
                f"{reserved} connections are reserved for groups: no less can be allowed"
            )
        before, slots.max_conn = slots.max_conn, max_conn
        for pool in pools:
            self._apply_limit(pool)
        in_use = len(slots.leases)
        return [f"limit over all pools: {before} before, {max_conn} now, {in_use} in use"]

    def _limit_pool(self, name: str, pools: list[Pool], max_conn: int) -> list[str]:
        slots = self._slots
        slots.limits[name] = max_conn
        said = []
        for pool in pools:
            before = pool.max_conn
            self._apply_limit(pool)
            now, in_use = pool.max_conn, len(pool.leases)
            said.append(f"pool {name!r}: limit {before} before, {now} now, {in_use} in use")
            if now < max_conn:
                said.append(f"no more than {slots.max_conn} are allowed over all pools")
        return said or [f"pool {name!r}: limit {max_conn} when it is used again"]

    def _apply_limit(self, pool: Pool) -> None:
        pool.max_conn = self._slots.limit(pool.name, pool.spec)
        self._slots.shrink(pool)
        self._sharing.limit_changed(pool)

    def configure(
        self, max_conn: int | None, groups: dict[str, GroupTerms], limits: dict[str, int]
    ) -> None:
        """Replace the terms of the last time; the excess comes back as it becomes free."""
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
        """Take back all that a process holds now: idle leases at once, those in use at checkin."""
        sessions = [s for s in self._slots.sessions.values() if s.pid == pid and not s.ended]
        if not sessions:
            raise OrderError(f"no process {pid} uses this broker (see `sharedpool status`)")
        return [self._drain_session(session, now) for session in sessions]

    def _drain_session(self, session: Session, now: float) -> str:
        pool = session.pool
        wanted = [
            lease
            for lease in session.leases.values()
            if lease.live is None and lease.state is not SlotState.FENCING
        ]
        idle = [lease for lease in wanted if pool.idle.pop(lease.token, None) is not None]
        said = f"{session.label} in pool {pool.name!r}: {len(wanted)} to come back"
        if session.silent:
            return f"{said}, but it is silent: they are ended when somebody waits for them"
        if wanted:
            session.draining.update(lease.token for lease in wanted)
            self._slots.shrinking[pool.name] = pool
            self._slots.mark_returns_due(session, 0)  # which raises it to what is drained
            self._slots.mark_taking(session, session.taking + len(idle))
            self._recalls.send(session, now, take=len(idle))
        return said

    def kill(self, token: Token, now: float) -> list[str]:
        """End one lease's connection, whatever it does: its slot is free once the backend ends."""
        lease = self._slots.leases.get(token)
        if lease is None:
            return [f"lease {token} is over"]
        if not lease.findable and (lease.session.suspect or lease.session.ended):
            return [self._kill_unconnected(lease, now)]
        if lease.state is SlotState.FENCING:
            return [f"lease {token} is being ended already"]
        if not lease.findable:
            raise OrderError(
                f"lease {token} has no connection yet, and its worker is there: try again"
            )
        if not (self._has_control_connection or lease.custody):
            raise OrderError(
                f"lease {token} cannot be ended from here:"
                " the broker has no control connection (--dsn)"
            )
        self._leases.take_away(lease, "ended by an operator", now)
        pid = f" (backend {lease.backend.pid})" if lease.backend is not None else ""
        whose = f"{lease.session.label} in pool {lease.pool.name!r}{pid}"
        return [f"lease {token} of {whose} is being ended"]

    def _kill_unconnected(self, lease: Lease, now: float) -> str:
        """Free or quarantine a slot without a known connection, whose worker is gone."""
        whose = f"lease {lease.token} of {lease.session.label}"
        if not self._has_control_connection:
            # There is nothing to end, and nobody to ask. The operator knows that the worker is
            # gone, if the broker cannot see that.
            self._leases.free(lease, "freed by an operator")
            return f"{whose} had no connection that is known of: its slot is free"
        if lease.state is not SlotState.FENCING:
            self._leases.fence(lease, "ended by an operator", now)
        return (
            f"{whose} has no connection that is known of:"
            " its slot is free once the server shows none either"
        )

    def reconnect(self, name: str, now: float) -> list[str]:
        """Begin a new generation: each connection is replaced at its next checkout or checkin."""
        said = []
        for pool in self._pools(name):
            self._begin_generation(pool, "asked for by `sharedpool reconnect`")
            said.append(
                f"pool {pool.name!r}: generation {pool.generation}: {len(pool.leases)}"
                " connections are replaced at their next checkout or checkin"
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

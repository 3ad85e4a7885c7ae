"""What happens to one lease: it is identified, used, closed, doubted, fenced or freed.

A slot is free only when its backend is known to be gone (`free`). Everything that casts doubt on a
lease ends in `fence`: its backend is ended and verified. Where no backend is known to look for, the
slot goes into quarantine (`quarantine.py`) until the server shows nothing that may be it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import Enum

from sharedpool.broker.core.commands import Send
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.fences import Fences
from sharedpool.broker.core.quarantine import Quarantine
from sharedpool.broker.core.recalls import ANSWER_LIMIT_S, Recalls
from sharedpool.broker.core.records import Lease, Pool, Session
from sharedpool.broker.core.routes import Routes
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.messages import START_UP_LIMIT_S, Ack, Gone
from sharedpool.wire.values import Backend, Phase, Token

# A proxy may keep a connect in its own queue for this long before the server hears of it: as long
# as a worker usually waits for the connect. After that, the server's list of backends is complete.
QUEUE_LIMIT_S = 10.0
# Workers' times are passed on to others: a larger number could not be sent.
LONGEST_MS = 2**53


class _Step(Enum):
    """What follows when a connection has ended on this side, and its backend may live on."""

    AWAIT_ROUTE = "a worker is about to report whether there is a proxy, and so what the end proves"
    FENCE = "have the backend ended and verified"
    ORDER_AGAIN = "the same once more: the first order may have relied on the socket"
    NONE = "the order under way does not rely on the socket"
    LOOK_NOW = "no proxy has the connect in its queue any more: let the server be asked at once"
    QUARANTINE = "no backend is known: have the server asked what is left"


class Leases:
    """All leases of one broker: applies evidence to them. Only `free` frees a slot.

    `drop(session)` is called when a session holds a lease less. `max_checkout_s` is the limit for
    pools that have none of their own (0: none). `journal_complete`: the records have all
    that former brokers granted, so that an unknown lease is one that was taken away.
    """

    def __init__(
        self,
        context: Context,
        recalls: Recalls,
        fences: Fences,
        routes: Routes,
        drop: Callable[[Session], None],
        *,
        max_checkout_s: float,
        ttl_s: float,
        journal_complete: bool,
    ) -> None:
        self._context = context
        self._slots = context.slots
        self._arm = context.timers.arm
        self._has_control_connection = context.has_control_connection
        self._recalls = recalls
        self._fences = fences
        self._drop = drop
        self._max_checkout_s = max_checkout_s
        self._ttl_s = ttl_s
        self._journal_complete = journal_complete
        self.routes = routes
        self.quarantine = Quarantine()
        self._ended_former: set[Token] = set()  # of former brokers, given back or fenced by now

    def believe_claims(self) -> None:
        """Admit unknown leases from now on: another broker granted some, by its own journal."""
        self._journal_complete = False

    def is_claimable(self, token: Token) -> bool:
        """Return True if an unknown lease may be held since before this broker."""
        if self._journal_complete or token.epoch == self._context.epoch:
            return False
        return token not in self._slots.leases and token not in self._ended_former

    # --- the backend

    def identify(self, lease: Lease, backend: Backend | None, now: float) -> None:
        """Record which backend a lease's connection has.

        A lease that was counted for the same backend without a known holder is freed: it is this
        one. So is one that was handed over while no broker knew of it.
        """
        if backend is None:
            return
        new = lease.backend is None or lease.backend != backend
        self._slots.identify(lease, backend)
        if new:
            self._note_route(lease, backend, now)
        for index in (self._slots.orphans, self._slots.restored):
            other = index.get(backend) if index else None
            if other is not None and other is not lease and other.state is SlotState.SUSPECT:
                self.free(other, "claimed")

    def _note_route(self, lease: Lease, backend: Backend, now: float) -> None:
        """Record what a new connection shows of the way to the server, and of a pooler there."""
        pool = lease.pool
        if pool.direct is None:  # the pool's first connection
            if backend.direct:
                self.hurry(pool)
            elif not self._has_control_connection:
                text = (
                    "pool %r: its connections may go through a proxy, and without a control"
                    " connection the broker cannot see their backends end: their slots stay"
                    " counted. Start the broker with --dsn"
                )
                self._context.log(logging.WARNING, text, pool.name, pool=pool.name, reason="proxy")
        pool.note_backend(backend)
        other = self.routes.lend(lease, backend)
        if other is None:
            return
        if other.state is SlotState.FENCING:
            self.free(other, "its pooler has lent the backend again")
        elif other.state is SlotState.OPEN and not (other.session.silent or lease.session.silent):
            self._ask_twins(other, lease, now)

    def _ask_twins(self, one: Lease, other: Lease, now: float) -> None:
        """Ask the holders of two leases that seem to have one backend whether both are open."""
        for session in dict.fromkeys((one.session, other.session)):
            self._recalls.send(session, now)
        self.routes.suspect_twins([one, other], [one.session.asked, other.session.asked])

    def hurry(self, pool: Pool) -> None:
        """Look at once for what is left of a pool's connects: none is in a proxy's queue."""
        for token in pool.leases:
            self.quarantine.hurry(token)

    # --- the end

    def free(self, lease: Lease, reason: str) -> None:
        """Free a slot: its backend is gone, or there never was one."""
        if lease.token.epoch != self._context.epoch:
            self._ended_former.add(lease.token)
        self.quarantine.discard(lease.token)
        self.routes.over(lease)
        self._slots.move(lease, SlotState.FREE, reason)
        self._drop(lease.session)

    def fence(
        self,
        lease: Lease,
        why: str,
        now: float,
        *,
        level: int = logging.INFO,
        peer_closed: bool = False,
    ) -> None:
        """Have a lease's backend ended and verified, whatever its worker does. `level`: the log's.

        Without a connection to look for, the slot goes into quarantine. `peer_closed`: the other
        side has closed the connection, so that it is in no proxy's queue any more.
        """
        if lease.state is not SlotState.SUSPECT:
            self._slots.move(lease, SlotState.SUSPECT, why)
        if self.routes.is_lent_again(lease):
            self.free(lease, "its pooler has lent the backend again")
        elif lease.findable:
            self._fences.begin(lease, why, now, level=level)
            unknown = lease.backend is None and self._has_control_connection
            if unknown and not self.routes.believes(lease):
                self._quarantine(lease, now)  # behind a proxy the end of its socket proves nothing
        else:
            self._slots.move(lease, SlotState.FENCING, why)
            lease.since = now
            self._fences.expect(lease, now)
            if self._has_control_connection:
                self._quarantine(lease, now, peer_closed=peer_closed)
            else:
                self._arm(now + START_UP_LIMIT_S, self._start_up_due, lease)

    def take_away(self, lease: Lease, why: str, now: float) -> None:
        """End a connection that its worker holds; tell the worker, lest it be checked out."""
        if lease.live is None and not lease.session.ended:
            ack = Ack([lease.token], [], lease.pool.generation, lease.pool.limit)
            self._context.emit(Send(lease.session.id, ack))
        self.fence(lease, why, now)

    def _quarantine(self, lease: Lease, now: float, *, peer_closed: bool = False) -> None:
        """Put a slot into quarantine: at once, if nothing can be waiting in a proxy's queue."""
        if lease.token in self.quarantine:
            return
        until = now if peer_closed or self.routes.is_direct(lease.pool) else now + QUEUE_LIMIT_S
        self.quarantine.add(lease.token, until)
        if until > now:
            self._arm(until, _may_survey, lease)

    def _start_up_due(self, lease: Lease, now: float) -> None:
        """Free the slot of a connect whose end nobody saw, and which nobody can look for."""
        if lease.state is SlotState.FENCING and not lease.findable:
            self.free(lease, "no login can still be in progress")

    def watch_connect(self, lease: Lease) -> None:
        """Watch for the moment from which a silent worker's connect must have ended.

        By then the worker cannot have begun to connect, nor still be logging in.
        """
        if self._has_control_connection and not lease.findable:
            due_at = lease.granted_at + self._ttl_s + START_UP_LIMIT_S
            self._arm(due_at, self._unconnected_due, lease)

    def _unconnected_due(self, lease: Lease, now: float) -> None:
        if lease.state is SlotState.SUSPECT and not lease.findable:
            self.fence(lease, "its worker was silent for longer than a connect takes", now)

    # --- evidence

    def vanished(self, lease: Lease) -> None:
        """Free the slot of a backend that was seen to be gone."""
        if not lease.session.ended:
            lease.session.vanished.add(lease.token)
            self.announce_end(lease)
        self.free(lease, "its backend is gone")

    def announce_end(self, lease: Lease) -> None:
        """Tell a worker that its connection has ended, unless it closes the connection itself."""
        if not lease.session.ended and lease.state in (SlotState.OPEN, SlotState.GRANTED):
            self._context.emit(Send(lease.session.id, Gone([lease.token])))

    def deposited(self, lease: Lease, now: float) -> None:
        """Record that the broker has the connection's socket in custody."""
        lease.custody = True
        if lease.state is SlotState.FENCING:  # the socket came late: there is something to end
            if self.routes.believes(lease):
                self.quarantine.discard(lease.token)
            self._fences.send_order(lease, "its worker is gone")

    def found(self, lease: Lease, backend: Backend, now: float) -> None:
        """Record the backend of a lease whose end was seen before its worker named the backend."""
        self.identify(lease, backend, now)
        if self._has_control_connection:
            self.quarantine.discard(lease.token)
            self._fences.send_order(lease, "its connection broke")

    def ended_without_proof(self, lease: Lease, now: float, *, peer_closed: bool = False) -> None:
        """Have the backend verified of a lease whose socket in custody has ended without proof.

        `peer_closed`: its other side has closed it, but that may be a proxy instead of the server.
        """
        lease.left = True
        nobody_can_look = lease.backend is None and not self._has_control_connection
        step = self._step_after_end(lease, peer_closed=peer_closed, nobody_can_look=nobody_can_look)
        if step is _Step.AWAIT_ROUTE:
            self.routes.unproven.add(lease)
            return
        if not nobody_can_look:  # else, with neither socket nor backend, it could never be freed
            lease.custody = False
        match step:
            case _Step.FENCE:
                # Behind a proxy, the worker usually closes the connection, and says so a moment
                # later.
                level = logging.DEBUG if peer_closed and lease.backend is not None else logging.INFO
                self.fence(lease, "its connection broke", now, level=level, peer_closed=peer_closed)
            case _Step.ORDER_AGAIN:
                self._fences.send_order(lease, "its connection broke")
            case _Step.LOOK_NOW:
                self.quarantine.hurry(lease.token)
            case _Step.QUARANTINE:
                self._quarantine(lease, now, peer_closed=peer_closed)

    def _step_after_end(self, lease: Lease, *, peer_closed: bool, nobody_can_look: bool) -> _Step:
        """Return what follows when a socket in custody has ended without proof."""
        if peer_closed and nobody_can_look and lease.pool.direct is None:
            return _Step.AWAIT_ROUTE
        if lease.state is not SlotState.FENCING:
            return _Step.FENCE
        if lease.backend is not None:
            return _Step.ORDER_AGAIN if lease.backend.direct else _Step.NONE
        if nobody_can_look and lease.custody:
            return _Step.ORDER_AGAIN
        if peer_closed and lease.token in self.quarantine:
            return _Step.LOOK_NOW
        return _Step.QUARANTINE

    def settle_unproven(self, now: float) -> None:
        """Free or verify leases whose connections have ended, once it is known what that proves."""
        for lease in list(self.routes.unproven):
            if self.routes.believes(lease):
                self.free(lease, "its backend is gone")
            elif lease.backend is not None:
                self.routes.unproven.discard(lease)
                self.ended_without_proof(lease, now, peer_closed=True)

    # --- idle or in use, and for how long

    def record_phase(
        self, lease: Lease, phase: Phase, since: float, thread: str, stack: Sequence[str] = ()
    ) -> None:
        """Record that an OPEN lease is idle or in use since then, and watch how long."""
        self._slots.mark_phase(lease, phase, since)
        lease.since, lease.thread, lease.stack = since, thread, stack
        if lease.session.taking:
            # The worker wrote this before it read the recall: do not recall the lease again.
            lease.pool.idle.pop(lease.token, None)
        if phase is Phase.IDLE and not lease.expiry_armed:
            lease.expiry_armed = True
            self._arm(since + lease.session.expiration_s, self._expiry_due, lease)
        limit_s = self._max_checkout(lease.pool)
        if phase is Phase.IN_USE and limit_s and not lease.checkout_armed:
            self._watch_checkout(lease, since + limit_s)

    def _max_checkout(self, pool: Pool) -> float:
        return pool.spec.max_checkout_ms / 1000 or self._max_checkout_s

    def _expiry_due(self, lease: Lease, now: float) -> None:
        """End or recall a connection that was idle for too long.

        A worker closes such connections itself when it calls its pool; this covers workers that
        never do.
        """
        lease.expiry_armed = False
        if lease.state is not SlotState.OPEN or lease.idle_since is None:
            return
        due_at = lease.idle_since + lease.session.expiration_s
        if lease.live is not None and due_at <= now:
            self._slots.unpark(lease)
            self.fence(lease, "parked for too long", now, level=logging.DEBUG)
            return
        if due_at <= now and not lease.session.silent and not lease.session.expiring:
            lease.session.expiring = True  # one question for all that expire together
            self._recalls.send(lease.session, now, expired=True)
        lease.expiry_armed = True
        self._arm(max(due_at, now + self._ttl_s / 3), self._expiry_due, lease)

    def _watch_checkout(self, lease: Lease, until: float) -> None:
        lease.checkout_armed = True
        self._arm(until, self._checkout_due, lease)

    def _checkout_due(self, lease: Lease, now: float) -> None:
        """Report a checkout that lasts too long, once, and end it if its pool wants that.

        1. The limit has not passed: a later checkout is in progress. Watch that one.
        2. The limit has passed, as far as is known. But a worker checks in and out without a
           message, so ask it whether this is still the same checkout.
        3. The answer, or none in time, has left `used_since` as it was: report.
        """
        lease.checkout_armed = False
        session, limit_s = lease.session, self._max_checkout(lease.pool)
        if lease.state is not SlotState.OPEN or lease.used_since is None:
            return
        if lease.reported_at >= lease.used_since:
            return
        due_at = lease.used_since + limit_s
        if due_at > now:
            self._watch_checkout(lease, due_at)
        elif lease.inquired_at < due_at:
            lease.inquired_at = now
            if not session.silent:
                self._recalls.send(session, now)
                lease.inquiry = session.asked
            self._watch_checkout(lease, now + ANSWER_LIMIT_S)
        else:
            lease.reported_at = lease.inquired_at
            self._report_checkout(lease, now - lease.used_since, limit_s)
            confirmed = 0 < lease.inquiry <= session.recall_confirmed
            if lease.pool.spec.end_overdue and confirmed:
                self.take_away(lease, "checked out for longer than max_checkout", now)

    def _report_checkout(self, lease: Lease, used_s: float, limit_s: float) -> None:
        pool, session = lease.pool, lease.session
        pool.counters.overdue += 1
        text = (
            "pool %r: lease %s has been checked out for %.1f s (max_checkout %.1f s)"
            " by %s, thread %r, backend %s%s"
        )
        self._context.log(
            logging.WARNING,
            text,
            pool.name,
            lease.token,
            used_s,
            limit_s,
            session.label,
            lease.thread,
            lease.backend.pid if lease.backend else "?",
            f", at {' < '.join(lease.stack)}" if lease.stack else "",
            pool=pool.name,
            lease=str(lease.token),
            session=session.label,
            reason="max_checkout",
        )


def _may_survey(lease: Lease, now: float) -> None:
    """Do nothing: after the alarm the ledger orders the survey that was not possible before."""

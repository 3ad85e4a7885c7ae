"""Leases as their workers report them: bring the books in line, fence what is doubtful, watch what lasts too long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.quarantine import Quarantine
from sharedpool.broker.core.records import Lease, Pool, Session, SlotState
from sharedpool.broker.core.routes import Routes
from sharedpool.broker.core.scheduler import ANSWER_LIMIT_S, Scheduler
from sharedpool.wire.messages import NO_TOKEN, START_UP_LIMIT_S, Backend, LeaseReport, Phase, Token

# For so long a proxy may keep a connect in a queue of its own, before the server hears of it: as long as a worker waits
# for it, as a rule. Afterwards what the server shows is all there is.
QUEUE_LIMIT_S = 10.0
# What a worker tells of times is told to others: a number beyond could not be sent.
LONGEST_MS = 2**53


class HandoverPort(Protocol):
    """The hand-over, as the leases see it."""

    def expire(self, lease: Lease, now: float) -> None:
        """End a parked connection that nobody has asked for."""


class TransitPort(Protocol):
    """The leases that have moved, as the leases' side sees them (`in_transit.InTransit`)."""

    def claims(self, session: Session, report: LeaseReport) -> Lease | None:
        """Return the lease that a session rightly says to hold, though the books say that another does."""

    def has_moved_on(self, token: Token) -> bool:
        """Say whether a lease that a session says to hold is another's by now."""

    def not_listed(self, lease: Lease, known_recall: int, now: float, *, unsure: bool) -> None:
        """Take in that a lease's new holder does not list it, and knows recall number `known_recall`."""

    def may_have_moved(self, lease: Lease, session: Session, spared_until: float) -> bool:
        """Say whether a lease of a former broker's, not held by whom its journal names, may have moved on since."""


class Leases:
    """The leases' side of the ledger. `drop(session)` is called when one of a session's leases is gone.

    `has_control_connection`: there is a control connection to ask. `journal_complete`: what former brokers granted is
    in the books already, so that an unknown lease is one that was taken away, never to be admitted again. `handover`
    and `transit` are set once they are made.
    """

    handover: HandoverPort
    transit: TransitPort

    def __init__(
        self,
        context: Context,
        scheduler: Scheduler,
        drop: Callable[[Session], None],
        *,
        max_checkout_s: float,
        ttl_s: float,
        journal_complete: bool,
        routes: Routes,
    ) -> None:
        self._slots = context.slots
        self._epoch = context.epoch
        self._scheduler = scheduler
        self._arm = context.timers.arm
        self._log = context.log
        self._drop = drop
        self._max_checkout_s = max_checkout_s
        self._ttl_s = ttl_s
        self._has_control_connection = context.has_control_connection
        self._journal_complete = journal_complete
        self.quarantine = Quarantine()
        self.routes = routes
        self._void: set[Token] = (
            set()
        )  # of older epochs, given back or fenced since: not to be claimed again

    def believe(self) -> None:
        """Admit unknown leases from now on: another broker, whose journal we do not have, granted them."""
        self._journal_complete = False

    def free(self, lease: Lease, reason: str) -> None:
        """Free a slot: its backend is gone, or there never was one."""
        if lease.token.epoch != self._epoch:
            self._void.add(lease.token)
        self.quarantine.discard(lease.token)
        self.routes.over(lease)
        self._slots.move(lease, SlotState.FREE, reason)
        self._drop(lease.session)

    def identify(self, lease: Lease, backend: Backend | None, now: float) -> None:
        """Note which backend a lease's connection is on.

        One that was counted for nobody is this lease's now; so is one that was handed over unknown to this broker.
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
        """Note what a new connection tells of the way to the server, and of a pooler there."""
        pool = lease.pool
        if pool.direct is None and backend.direct:
            self.hurry(pool)
        if pool.direct is None and not backend.direct and not self._has_control_connection:
            text = (
                "pool %r: there is a proxy between its workers and the server, or no telling, and no control connection"
                " to ask when a connection has ended: its slot stays counted (start the broker with --dsn)"
            )
            self._log(logging.WARNING, text, pool.name, pool=pool.name, reason="proxy")
        pool.note_backend(backend)
        other = self.routes.lend(lease, backend)
        if other is None:
            return
        if other.state is SlotState.FENCING:
            self.free(other, "its pooler has lent the backend again")
        elif other.state is SlotState.OPEN and not (other.session.silent or lease.session.silent):
            for session in {
                other.session.id: other.session,
                lease.session.id: lease.session,
            }.values():
                self._scheduler.send_recall(session, now)
            self.routes.suspect_twins([other, lease], [other.session.asked, lease.session.asked])

    def hurry(self, pool: Pool) -> None:
        """Look at once for what is left of a pool's connects: there turns out to be no queue but the server's own."""
        for token in pool.leases:
            self.quarantine.hurry(token)

    def fence(
        self, lease: Lease, why: str, now: float, *, level: int = logging.INFO, closed: bool = False
    ) -> None:
        """Have a lease's backend ended and verified, whatever its worker does. `level`: the log's.

        Without a connection to look for, the slot goes into quarantine until the server shows nothing that may be it.
        `closed`: the other side of that connection has closed it, so that it is in no queue any more.
        """
        if lease.state is not SlotState.SUSPECT:
            self._slots.move(lease, SlotState.SUSPECT, why)
        if self.routes.is_lent_again(lease):
            self.free(lease, "its pooler has lent the backend again")
        elif lease.findable:
            self._scheduler.fence_suspect(lease, why, now, level=level)
            if (
                lease.backend is None
                and self._has_control_connection
                and not self.routes.believes(lease)
            ):
                self._seclude(lease, now)  # its socket, cut, will prove nothing
        else:
            self._slots.move(lease, SlotState.FENCING, why)
            lease.since = now
            self._scheduler.expect(lease, now)
            if self._has_control_connection:
                self._seclude(lease, now, closed=closed)
            else:
                self._arm(now + START_UP_LIMIT_S, self.start_up_due, lease)

    def _seclude(self, lease: Lease, now: float, *, closed: bool = False) -> None:
        """Put a slot into quarantine: at once, if nothing can be waiting in a proxy's queue."""
        if lease.token in self.quarantine:
            return
        until = now if closed or self.routes.is_direct(lease.pool) else now + QUEUE_LIMIT_S
        self.quarantine.add(lease.token, until)
        if until > now:
            self._arm(until, _may_survey, lease)

    def start_up_due(self, lease: Lease, now: float) -> None:
        """Free a slot whose connect had no end that anybody saw, and that nobody can look for."""
        if lease.state is SlotState.FENCING and not lease.findable:
            self.free(lease, "the server gives no client longer to log in")

    def mistrust(self, lease: Lease) -> None:
        """Watch for the moment when a silent worker cannot have begun to connect, nor still be logging in."""
        if self._has_control_connection and not lease.findable:
            self._arm(
                lease.granted_at + self._ttl_s + START_UP_LIMIT_S, self.unconnected_due, lease
            )

    def unconnected_due(self, lease: Lease, now: float) -> None:
        """Look for what is left of a connect of which nobody has spoken for so long."""
        if lease.state is SlotState.SUSPECT and not lease.findable:
            self.fence(lease, "its worker was silent for longer than a connect takes", now)

    def deposited(self, lease: Lease, now: float) -> None:
        """Note that the broker has the connection's socket in custody."""
        lease.custody = True
        if lease.state is SlotState.FENCING:  # it came late: there is something to end after all
            if self.routes.believes(lease):
                self.quarantine.discard(lease.token)
            self._scheduler.order_fence(lease, "its worker is gone")

    def lost(self, lease: Lease, now: float, *, closed: bool = False) -> None:
        """Have a lease's backend verified whose socket, in custody, is of no use as evidence any more.

        `closed`: its other side has closed it, but that need not be the server.
        """
        lease.closed = True
        if (
            closed
            and lease.backend is None
            and lease.pool.direct is None
            and not self._has_control_connection
        ):
            self.routes.unproven.add(lease)
            return
        if lease.backend is not None or self._has_control_connection:
            lease.custody = (
                False  # else there is nothing to look for, and nobody to look: it stays counted
            )
        if lease.state is not SlotState.FENCING:
            proxied = (
                closed and lease.backend is not None
            )  # its worker closes it, as a rule, and says so later
            level = logging.DEBUG if proxied else logging.INFO
            self.fence(lease, "its connection broke", now, level=level, closed=closed)
        elif lease.findable:
            if lease.backend is None or lease.backend.direct:
                self._scheduler.order_fence(
                    lease, "its connection broke"
                )  # the first order may have relied on the socket
        elif closed and lease.token in self.quarantine:
            self.quarantine.hurry(lease.token)
        else:
            self._seclude(lease, now, closed=closed)

    def found(self, lease: Lease, backend: Backend, now: float) -> None:
        """Take in on which backend a lease is that is being ended already."""
        self.identify(lease, backend, now)
        if not self._has_control_connection:
            return
        self.quarantine.discard(lease.token)
        self._scheduler.order_fence(lease, "its connection broke")

    def prove(self, now: float) -> None:
        """See to connections that have ended, as it becomes known what that proves."""
        for lease in list(self.routes.unproven):
            if self.routes.believes(lease):
                self.free(lease, "its backend is gone")
            elif lease.backend is not None:
                self.routes.unproven.discard(lease)
                self.lost(lease, now, closed=True)

    def reconcile(
        self,
        session: Session,
        reports: list[LeaseReport],
        now: float,
        *,
        newest_grant: Token = NO_TOKEN,
        claim: bool = False,
        known_recall: int = 0,
        unsure: bool = False,
    ) -> list[Token]:
        """Bring the books in line with a worker's word; return the tokens it has no right to.

        `claim`: it registers; `known_recall`: it knows this recall; `unsure`: it may have received what it does not
        list.
        """
        if newest_grant.epoch != self._epoch:
            newest_grant = NO_TOKEN  # a former broker's, whose numbers may have been higher
        revoked = []
        listed = set()
        for report in reports:
            listed.add(report.token)
            lease = session.leases.get(report.token)
            if lease is not None and lease.live is not None:
                continue  # said before it was given
            if lease is None:
                lease = self.transit.claims(session, report)
            if lease is None and self.transit.has_moved_on(report.token):
                continue
            if lease is None and claim and self._claimable(report.token):
                lease = Lease(report.token, session, session.pool, granted_at=now)
                opened = report.backend is not None or report.phase is not Phase.CONNECTING
                self._slots.move(lease, SlotState.OPEN if opened else SlotState.GRANTED, "claimed")
            if lease is None or lease.state is SlotState.FENCING:
                revoked.append(report.token)
                continue
            self._update(lease, report, now)
        session.vanished &= listed
        for lease in list(session.leases.values()):
            if (
                lease.unconfirmed
                and lease.token not in listed
                and lease.state is not SlotState.FENCING
            ):
                if not claim:  # else it is asked once it is welcome: before that it hears nothing
                    self.transit.not_listed(lease, known_recall, now, unsure=unsure)
                continue
            # What has come in the lane was spoken of before: else it is missing.
            known = (
                lease.token.epoch != self._epoch or lease.token <= newest_grant or lease.moves > 0
            )
            if not known or lease.token in listed or lease.state is SlotState.FENCING:
                continue
            if lease.live is not None:
                continue  # given by it: the desk's line loses nothing
            if lease.token.epoch != self._epoch and self.transit.may_have_moved(
                lease, session, now + self._ttl_s
            ):
                continue
            # Its RELEASE may have told that nobody saw the backend end, or that a connect timed out: what RENEW's
            # `gone` does not name may be left on the server, known or not.
            self.fence(lease, "its RELEASE was lost", now)
        return revoked

    def _claimable(self, token: Token) -> bool:
        """Say whether a lease may have been held since before this broker started, unknown to it."""
        if self._journal_complete or token.epoch == self._epoch:
            return False
        return token not in self._slots.leases and token not in self._void

    def _update(self, lease: Lease, report: LeaseReport, now: float) -> None:
        if report.phase is Phase.CONNECTING and lease.unconfirmed:
            # It has come, and lies unread or is in a thread's hands: the next report may be made just when it is
            # in neither list, between the two.
            lease.unconfirmed_since, lease.confirm_recall = now, 0
        else:
            lease.unconfirmed = False
        since = now - max(0, min(report.age_ms, LONGEST_MS)) / 1000
        self.identify(lease, report.backend, now)
        if report.phase is Phase.CONNECTING:
            state = SlotState.OPEN if lease.backend else SlotState.GRANTED
        else:
            state = SlotState.CLOSING if report.phase is Phase.CLOSING else SlotState.OPEN
        if state is SlotState.GRANTED and lease.state in (SlotState.OPEN, SlotState.CLOSING):
            return  # older news than what is known
        if lease.state is SlotState.GRANTED and state is SlotState.CLOSING:
            self._slots.move(lease, SlotState.OPEN, "confirmed by report")
        if lease.state is not state:
            self._slots.move(lease, state, "reported")
            if state is SlotState.CLOSING:
                lease.since = since
                self._scheduler.expect(lease, now)
        if state is SlotState.OPEN:
            self.note(lease, report.phase, since, report.thread, report.stack)

    def note(
        self, lease: Lease, phase: Phase, since: float, thread: str, stack: Sequence[str] = ()
    ) -> None:
        """Note that an OPEN lease is idle or in use since then, and watch how long."""
        self._slots.mark_phase(lease, phase, since)
        lease.since, lease.thread, lease.stack = since, thread, stack
        if lease.session.taking:
            lease.pool.idle.pop(
                lease.token, None
            )  # spoken before it knew that it was asked: not asked for twice
        if phase is Phase.IDLE and not lease.expiry_armed:
            lease.expiry_armed = True
            self._arm(since + lease.session.expiration_s, self.expiry_due, lease)
        if phase is Phase.IN_USE and self._max_checkout(lease.pool) and not lease.checkout_armed:
            lease.checkout_armed = True
            self._arm(since + self._max_checkout(lease.pool), self.checkout_due, lease)

    def _max_checkout(self, pool: Pool) -> float:
        return pool.spec.max_checkout_ms / 1000 or self._max_checkout_s

    # --- timers

    def expiry_due(self, lease: Lease, now: float) -> None:
        """Recall what has been idle for too long: also in a worker that never calls its pool again."""
        lease.expiry_armed = False
        if lease.state is SlotState.OPEN and lease.idle_since is not None:
            due = lease.idle_since + lease.session.expiration_s
            if lease.live is not None and due <= now:
                self.handover.expire(lease, now)
                return
            lease.expiry_armed = True
            if due <= now and not lease.session.silent and not lease.session.expiring:
                lease.session.expiring = True  # one question for all that expire together
                self._scheduler.send_recall(lease.session, now, expired=True)
            self._arm(max(due, now + self._ttl_s / 3), self.expiry_due, lease)

    def checkout_due(self, lease: Lease, now: float) -> None:
        """Report a checkout that lasts too long, once, and end it if its pool wants that."""
        lease.checkout_armed = False
        limit, session, pool = self._max_checkout(lease.pool), lease.session, lease.pool
        if (
            lease.state is not SlotState.OPEN
            or lease.used_since is None
            or lease.reported_at >= lease.used_since
        ):
            return
        if lease.used_since + limit > now:
            lease.checkout_armed = True
            self._arm(lease.used_since + limit, self.checkout_due, lease)
            return
        if lease.inquired_at < lease.used_since + limit:
            # A worker checks in and out without a word: it is asked whether this is the same checkout still.
            lease.inquired_at, lease.checkout_armed = now, True
            if not session.silent:
                self._scheduler.send_recall(session, now)
                lease.inquiry = session.asked
            self._arm(now + ANSWER_LIMIT_S, self.checkout_due, lease)
            return
        lease.reported_at = lease.inquired_at
        pool.overdue += 1
        text = "pool %r: lease %s has been checked out for %.1f s (max_checkout %.1f s) by %s, thread %r, backend %s%s"
        pid = lease.backend.pid if lease.backend else "?"
        where = f", at {' < '.join(lease.stack)}" if lease.stack else ""
        self._log(
            logging.WARNING, text, pool.name, lease.token, now - lease.used_since, limit, session.label, lease.thread,
            pid, where, pool=pool.name, lease=str(lease.token), session=session.label, reason="max_checkout",
        )  # fmt: skip
        if pool.spec.end_overdue and 0 < lease.inquiry <= session.recall_confirmed:
            self.end(lease, "checked out for longer than max_checkout", now)

    def end(self, lease: Lease, why: str, now: float) -> None:
        """End a connection that its worker holds; that is told now, so that it does not lend it out meanwhile."""
        if lease.live is None and not lease.session.ended:
            self._scheduler.revoke(lease)
        self.fence(lease, why, now)


def _may_survey(lease: Lease, now: float) -> None:
    """Do nothing: the alarm has the ledger order the survey that was not possible before."""

"""Bring the records in line with a worker's list of its leases (HELLO and RENEW).

A list may be older than the records, and what it does not name may be on its way. So each
lease is looked at in the light of what the worker knew when it made the list: its newest grant and
its newest recall.
"""

from __future__ import annotations

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.fences import Fences
from sharedpool.broker.core.in_transit import InTransit
from sharedpool.broker.core.leases import LONGEST_MS, Leases
from sharedpool.broker.core.records import Lease, Session
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.values import NO_TOKEN, LeaseReport, Phase, Token


class Reconciler:
    """Compares workers' lists with the records of one broker."""

    def __init__(
        self, context: Context, fences: Fences, leases: Leases, transit: InTransit, *, ttl_s: float
    ) -> None:
        self._slots = context.slots
        self._epoch = context.epoch
        self._fences = fences
        self._leases = leases
        self._transit = transit
        self._ttl_s = ttl_s

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
        """Bring the records in line with a worker's list; return the tokens it has no right to.

        `claim`: the worker registers. `known_recall`: the newest recall it knows. `unsure`: it may
        have received a lease that it does not list.
        """
        revoked = []
        for report in reports:
            lease = session.leases.get(report.token)
            if lease is not None and lease.live is not None:
                continue  # given to the broker after the list was made
            lease = lease or self._transit.claims(session, report)
            if lease is None and self._transit.has_moved_on(report.token):
                continue
            if lease is None and claim and self._leases.is_claimable(report.token):
                lease = self._admit(session, report, now)
            if lease is None or lease.state is SlotState.FENCING:
                revoked.append(report.token)
            else:
                self._update(lease, report, now)
        listed = {report.token for report in reports}
        session.vanished &= listed
        if newest_grant.epoch != self._epoch:
            newest_grant = NO_TOKEN  # a former broker's grant: its number says nothing here
        for lease in list(session.leases.values()):
            if lease.token in listed or lease.state is SlotState.FENCING:
                continue
            if lease.unconfirmed:
                if not claim:  # else it is asked once it is welcome: before that it hears nothing
                    self._transit.not_listed(lease, known_recall, now, unsure=unsure)
            elif self._should_be_listed(lease, newest_grant) and not self._may_be_elsewhere(
                lease, now
            ):
                # Its RELEASE may have said that nobody saw the backend end, or that a connect timed
                # out. So unless RENEW's `gone` names it, a backend may be left on the server.
                self._leases.fence(lease, "its RELEASE was lost", now)
        return revoked

    def _admit(self, session: Session, report: LeaseReport, now: float) -> Lease:
        """Enter a lease of a former broker that its worker claims."""
        lease = Lease(report.token, session, session.pool, granted_at=now)
        opened = report.backend is not None or report.phase is not Phase.CONNECTING
        self._slots.move(lease, SlotState.OPEN if opened else SlotState.GRANTED, "claimed")
        return lease

    def _should_be_listed(self, lease: Lease, newest_grant: Token) -> bool:
        """Return False if the grant may be on its way, or if the worker gave the lease back.

        What is given comes over the desk's line, which loses nothing.
        """
        # A lease that came in the lane had been listed before.
        former = lease.token.epoch != self._epoch
        return lease.live is None and (former or lease.token <= newest_grant or lease.moves > 0)

    def _may_be_elsewhere(self, lease: Lease, now: float) -> bool:
        """Return True if a lease may have moved in a former lane; leave it to its claimant."""
        return lease.token.epoch != self._epoch and self._transit.may_have_moved(
            lease, lease.session, now + self._ttl_s
        )

    def _update(self, lease: Lease, report: LeaseReport, now: float) -> None:
        """Bring one lease in line with its worker's report."""
        if lease.unconfirmed and report.moves != max(0, lease.moves):
            return  # it has gone to another worker and come back since: no proof of its arrival
        if report.phase is Phase.CONNECTING and lease.unconfirmed:
            # The connection has arrived, and is unread or in a thread's hands. The next list may be
            # made just when it is between the two, and in neither.
            lease.unconfirmed_since, lease.confirm_recall = now, 0
        else:
            lease.unconfirmed = False
        since = now - max(0, min(report.age_ms, LONGEST_MS)) / 1000
        self._leases.identify(lease, report.backend, now)
        if report.phase is Phase.CONNECTING:
            state = SlotState.OPEN if lease.backend else SlotState.GRANTED
        else:
            state = SlotState.CLOSING if report.phase is Phase.CLOSING else SlotState.OPEN
        if state is SlotState.GRANTED and lease.state in (SlotState.OPEN, SlotState.CLOSING):
            return  # older than the records
        if lease.state is SlotState.GRANTED and state is SlotState.CLOSING:
            self._slots.move(lease, SlotState.OPEN, "confirmed by report")
        if lease.state is not state:
            self._slots.move(lease, state, "reported")
            if state is SlotState.CLOSING:
                lease.since = since
                self._fences.expect(lease, now)
        if state is SlotState.OPEN:
            self._leases.record_phase(lease, report.phase, since, report.thread, report.stack)

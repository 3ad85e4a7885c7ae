"""What workers say of their leases: CONFIRM, RENEW and RELEASE."""

from __future__ import annotations

import logging

from sharedpool.broker.core.commands import Send
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.denials import Denials
from sharedpool.broker.core.failover import Failover
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.moves import Moves
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.reconciler import Reconciler
from sharedpool.broker.core.records import Lease, Session
from sharedpool.broker.core.routes import sessions_not_kept_text
from sharedpool.broker.core.scheduler import Scheduler
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.messages import Ack, Confirm, Reject, Release, ReleaseReason, Renew
from sharedpool.wire.values import NO_TOKEN, Phase


class LeaseMessages:
    """Handles the messages of registered sessions about their leases."""

    def __init__(
        self,
        context: Context,
        scheduler: Scheduler,
        recalls: Recalls,
        denials: Denials,
        leases: Leases,
        reconciler: Reconciler,
        moves: Moves,
        failover: Failover,
    ) -> None:
        self._context = context
        self._slots = context.slots
        self._emit = context.emit
        self._scheduler = scheduler
        self._recalls = recalls
        self._denials = denials
        self._leases = leases
        self._reconciler = reconciler
        self._moves = moves
        self._failover = failover

    def confirm(self, session: Session, confirm: Confirm, now: float) -> None:
        """Handle that a worker has opened a lease's connection."""
        lease = session.leases.get(confirm.token)
        if lease is None:
            return
        if lease.state is not SlotState.FENCING:
            self._leases.identify(lease, confirm.backend, now)
            if lease.state is not SlotState.OPEN:
                self._slots.move(lease, SlotState.OPEN, "confirmed")
            self._failover.opened(lease, confirm, now)
            self._leases.record_phase(lease, Phase.IN_USE, now, "")
        elif lease.backend is None:  # the end of its connection was seen first
            self._leases.found(lease, confirm.backend, now)

    # --- RENEW

    def renew(self, session: Session, renew: Renew, now: float) -> None:
        """Handle a worker's list of leases and requests: a heartbeat, or a recall's answer.

        The list repairs what lost messages have left wrong, in the order of the steps here.
        """
        session.note_timings(renew.times)
        session.recall_confirmed = max(session.recall_confirmed, renew.answers)
        self._recalls.answered(session, renew.answers)
        pending = set(renew.pending)
        for waiter in [w for w in session.waiters.values() if w.request not in pending]:
            self._slots.dequeue(waiter)  # its WITHDRAW was lost
        self._repeat_releases(session, renew, now)
        revoked = self._reconciler.reconcile(
            session,
            renew.leases,
            now,
            newest_grant=renew.newest_grant,
            known_recall=renew.answers,
            unsure=renew.unsure,
        )
        self._moves.former.session_answered(session, renew.answers, now, unsure=renew.unsure)
        if (twin := self._leases.routes.answered(session, renew.answers)) is not None:
            self._mark_unsuitable(twin, now)
        is_heartbeat = not renew.answers
        if is_heartbeat or revoked:
            pool = session.pool
            known = [*renew.gone, *(release.token for release in renew.unproven)]
            self._emit(Send(session.id, Ack(revoked, known, pool.generation, pool.limit)))
        if is_heartbeat:
            self._repeat_grants(session, renew)
            if pending and not self._knows_all(session, pending):
                # An ACQUIRE or DENY was lost, or the session was silent for too long: nobody would
                # ever answer that request.
                text = "this broker does not know all requests: ask again"
                self._emit(Send(session.id, Reject(text)))

    def _repeat_releases(self, session: Session, renew: Renew, now: float) -> None:
        """Handle what RELEASE has told before: that message may have been lost."""
        for token in renew.gone:
            if (lease := session.leases.get(token)) is not None:
                self._leases.free(lease, "given back")
        for release in renew.unproven:
            self.release(session, release, now)

    def _repeat_grants(self, session: Session, renew: Renew) -> None:
        """Send the grants again that a worker has not seen: they are lost, or on their way."""
        epoch = self._context.epoch
        seen = renew.newest_grant if renew.newest_grant.epoch == epoch else NO_TOKEN
        for lease in session.granted.values():
            if lease.token > seen and lease.token.epoch == epoch:
                self._scheduler.send_grant(lease)

    @staticmethod
    def _knows_all(session: Session, pending: set[int]) -> bool:
        """Return True if each request that a worker waits for is queued, granted, or served."""
        passed_on = {  # to the worker, and not confirmed by it yet
            lease.request
            for lease in session.leases.values()
            if lease.unconfirmed and lease.state is SlotState.OPEN
        }
        return pending <= session.waiters.keys() | session.granted.keys() | passed_on

    def _mark_unsuitable(self, lease: Lease, now: float) -> None:
        """Stop using a pool: two open leases have the same backend. Replace what is held."""
        pool, pid = lease.pool, lease.backend.pid if lease.backend else 0
        pool.unsuitable = sessions_not_kept_text(
            f"two connections that are open at the same time have the same backend, {pid}"
        )
        self._context.log(
            logging.ERROR,
            "pool %r: %s",
            pool.name,
            pool.unsuitable,
            pool=pool.name,
            reason="sessions not kept",
        )
        self._failover.begin_generation(pool, "its server is unsuitable")
        self._denials.deny_unsuitable(pool, now)

    # --- RELEASE

    def release(self, session: Session, release: Release, now: float) -> None:
        """Handle that a worker gives a lease back: free the slot, or verify its backend's end."""
        lease = session.leases.get(release.token)
        if lease is None:
            lease = self._moves.transit.closed_in_transit(session, release)
        if release.token in session.vanished:
            session.vanished.discard(release.token)  # the broker saw the backend's end first
        elif lease is None or (
            lease.state is SlotState.FENCING and not self._proves_end(release, lease)
        ):
            return
        if release.reason is ReleaseReason.RETURN_DUE:
            session.pool.counters.recalls += 1
            if session.returns_due:
                self._slots.mark_returns_due(session, session.returns_due - 1)
        if release.error:
            self._failover.failed(session, release, now)
        if lease is None:
            return
        if self._proves_end(release, lease):
            self._leases.free(lease, release.reason)
        else:
            self._verify_end(lease, release, now)

    def _proves_end(self, release: Release, lease: Lease) -> bool:
        return release.gone or (release.peer_closed and self._leases.routes.believes_refusal(lease))

    def _verify_end(self, lease: Lease, release: Release, now: float) -> None:
        self._leases.identify(lease, release.backend, now)
        lease.left = True
        # Behind a proxy, this happens at every close.
        behind_proxy = lease.backend is not None and not lease.backend.direct
        self._leases.fence(
            lease,
            "its worker could not see the backend end",
            now,
            level=logging.DEBUG if behind_proxy else logging.INFO,
            peer_closed=release.peer_closed,
        )

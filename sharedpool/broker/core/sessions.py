"""Sessions: a worker process registers with HELLO, is heard from, falls silent, leaves or dies.

1. *Registered*: HELLO lists what the worker holds; WELCOME tells it the broker's terms.
2. *Suspect*: nothing was heard for the TTL. Its leases stay counted, and are fenced when somebody
   waits for them. Any message brings the session back.
3. *Ended*: it has said BYE, or its process has died. Its leases are fenced at once; when the last
   one is gone, the session is forgotten.

A *restored* session is known from a former broker's journal only: it is suspect until its HELLO.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from operator import attrgetter

from sharedpool.broker.core.commands import Forget, Process, Send, Watch
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.demand import has_room
from sharedpool.broker.core.leases import LONGEST_MS, Leases
from sharedpool.broker.core.moves import Moves
from sharedpool.broker.core.pool_directory import PoolDirectory
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.reconciler import Reconciler
from sharedpool.broker.core.records import Lease, Pool, Session
from sharedpool.broker.core.session_states import ENDED, LIVE, SUSPECT
from sharedpool.broker.core.sharing import Sharing
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.broker.core.timers import Alarm
from sharedpool.wire.application_name import tag_of
from sharedpool.wire.messages import PROTOCOL_VERSION, Acquire, Bye, Hello, Reject, Welcome
from sharedpool.wire.values import NO_TOKEN, Token

_MOST_STRANGERS = 10  # other servers of one pool that the log tells of
_SHOWN = 255  # characters of a worker's title and host name, which are in every report


def version_mismatch_text(version: int) -> str:
    """Return what a worker of another protocol version is told."""
    return (
        f"the broker speaks protocol {PROTOCOL_VERSION}, this worker {version}:"
        " install the same sharedpool version for both, and restart what is older"
    )


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms that every session gets. Times in seconds; see `Ledger`."""

    epoch: int
    ttl_s: float
    expiration_s: float = math.inf
    instance: str = ""
    desk: str = ""
    handover: bool = False


class Sessions:
    """All sessions of one broker."""

    def __init__(
        self,
        context: Context,
        terms: Terms,
        directory: PoolDirectory,
        recalls: Recalls,
        leases: Leases,
        reconciler: Reconciler,
        moves: Moves,
        sharing: Sharing,
    ) -> None:
        self._terms = terms
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._log = context.log
        self._directory = directory
        self._recalls = recalls
        self._leases = leases
        self._reconciler = reconciler
        self._moves = moves
        self._sharing = sharing
        # Sessions that are neither suspect nor ended. One alarm, for the one that was unheard for
        # longest when it was set, watches all: a message changes nothing but its session.
        self._not_silent: dict[bytes, Session] = {}
        self._alarm: Alarm | None = None

    # --- HELLO

    def register(
        self, session_id: bytes, hello: Hello, now: float, process: Process | None
    ) -> Acquire | None:
        """Register a session, for the first time or again.

        Return the request that came with HELLO, if it is to be answered at once.
        """
        if hello.version != PROTOCOL_VERSION:
            self._emit(Send(session_id, Reject(version_mismatch_text(hello.version), fatal=True)))
            return None
        slots = self._slots
        pool = self._directory.get(hello.pool)
        self._warn_of_other_server(pool, hello)
        session = slots.sessions.get(session_id)
        if session is not None and session.ended:
            return None  # the message is late: its process is gone
        if session is None:
            session = self._add(session_id, hello, pool, now, process)
        elif session.restored:
            session.restored = False
            session.spared_until = -math.inf
            session.process = process  # as it is known here, not to the former broker
            self._emit(Watch(session_id, process))
        # A worker that starts over has forgotten what it was asked for.
        self._recalls.expect_no_answer(session)
        slots.mark_returns_due(session, 0)
        self.heard_from(session, now)
        revoked = self._reconciler.reconcile(
            session, hello.leases, now, newest_grant=hello.newest_grant, claim=True
        )
        first = hello.first
        if first is not None and first.request not in session.granted and not has_room(slots, pool):
            # A request that has to wait is made again from the lane, where a connection can be
            # passed to it.
            first = None
        # A session that connects to another server, or as another role, takes no part in the
        # hand-over.
        session.hands_over = (
            self._terms.handover
            and hello.pool.server == pool.spec.server
            and pool.cancel_works is not False
        )
        self._welcome(session, hello, revoked, first)
        self._moves.session_registered(session, now)
        return first

    def _add(
        self, session_id: bytes, hello: Hello, pool: Pool, now: float, process: Process | None
    ) -> Session:
        wanted_s = min(hello.pool.expiration_ms, LONGEST_MS) / 1000
        session = Session(
            session_id,
            hello.pid,
            hello.host[:_SHOWN],
            hello.title[:_SHOWN],
            pool,
            min(self._terms.expiration_s, wanted_s),
            now,
            process,
        )
        self._slots.sessions[session_id] = pool.sessions[session_id] = session
        self._emit(Watch(session_id, process))
        return session

    def _welcome(
        self, session: Session, hello: Hello, revoked: list[Token], first: Acquire | None
    ) -> None:
        terms, pool = self._terms, session.pool
        welcome = Welcome(
            PROTOCOL_VERSION,
            terms.epoch,
            pool.limit,
            int(session.expiration_s * 1000),
            int(terms.ttl_s * 1000),
            revoked,
            tag_of(pool.spec.name, terms.instance),
            terms.desk,
            pool.generation,
            session.hands_over,
            hello.nonce,
            0 if first is None else first.request,
        )
        self._emit(Send(session.id, welcome))

    def _warn_of_other_server(self, pool: Pool, hello: Hello) -> None:
        """Warn, once for each server, that a process connects elsewhere than its pool's others."""
        server = hello.pool.server
        if server == pool.spec.server or server in pool.strangers:
            return
        if len(pool.strangers) == _MOST_STRANGERS:
            return
        pool.strangers.add(server)
        self._log(
            logging.WARNING,
            "pool %r: process %d connects to %s, the pool's first process to %s;"
            " give one of them another name=",
            pool.name,
            hello.pid,
            server,
            pool.spec.server,
            pool=pool.name,
            session=f"{hello.title}[{hello.pid}]",
            reason="another server",
        )

    # --- silence

    def heard_from(self, session: Session, now: float) -> None:
        """Record that a session has sent a message."""
        session.heard_at = now
        if (session.state is LIVE and session.id in self._not_silent) or session.ended:
            return
        if session.state is not LIVE:
            self._slots.move_session(session, LIVE)
        self._not_silent[session.id] = session
        if self._alarm is None:
            self._watch_until(now + self._terms.ttl_s)

    def _watch_until(self, when: float) -> None:
        self._alarm = self._arm(when, self._silence_due, None)

    def _stop_watching(self, session: Session) -> None:
        self._not_silent.pop(session.id, None)
        if not self._not_silent and self._alarm is not None:
            self._alarm.cancelled = True
            self._alarm = None

    def _silence_due(self, _: None, now: float) -> None:
        """Suspect the sessions that have been silent for the TTL, and watch for the next one."""
        self._alarm = None
        for session in sorted(self._not_silent.values(), key=attrgetter("heard_at")):
            if session.id not in self._not_silent:
                continue  # it was ended together with another one
            due_at = session.heard_at + self._terms.ttl_s
            if due_at > now:
                self._watch_until(due_at)
                return
            self._stop_watching(session)
            self._suspect(session, now)

    def _suspect(self, session: Session, now: float) -> None:
        """Suspect a silent session; without leases, forget it: it says HELLO when it comes back."""
        pool = session.pool
        self._log(
            logging.WARNING,
            "pool %r: %s has been silent for %.1f s: its %d leases are suspect",
            pool.name,
            session.label,
            now - session.heard_at,
            len(session.leases),
            pool=pool.name,
            session=session.label,
            reason="silent",
        )
        self._slots.move_session(session, SUSPECT)
        self._recalls.expect_no_answer(session)
        for lease in list(session.leases.values()):
            if lease.state not in (SlotState.SUSPECT, SlotState.FENCING) and lease.live is None:
                self._slots.move(lease, SlotState.SUSPECT, "TTL passed")
                self._leases.watch_connect(lease)
        for waiter in list(session.waiters.values()):
            self._slots.dequeue(waiter)
        self.drop_if_over(session)

    # --- the end

    def deregister(self, session: Session, bye: Bye, now: float) -> None:
        """Handle BYE: the worker holds nothing, and will not use a grant that is on its way.

        All the same, the RELEASE that told of a connect without an end may have been lost, perhaps
        with a former broker.
        """
        session.note_timings(bye.times)
        seen = bye.newest_grant if bye.newest_grant.epoch == self._terms.epoch else NO_TOKEN
        self.end(session, "its worker left without returning it", now, unused_above=seen)

    def end(
        self, session: Session, why: str, now: float, *, unused_above: Token | None = None
    ) -> None:
        """End a session: fence its leases, and drop its requests.

        Leases above `unused_above`, if given, were never taken up by its worker. This may be called
        twice: a worker's end is seen by its process and by its line to the desk.
        """
        self._stop_watching(session)
        if not session.ended:
            self._slots.move_session(session, ENDED)
            self._log_end(session, why)
        for waiter in list(session.waiters.values()):
            self._slots.dequeue(waiter)
        self._recalls.expect_no_answer(session)
        # What a member of a former broker's lane held may have moved on there.
        was_in_lane = session.id in session.pool.former
        self._moves.session_ended(session)
        self._moves.check_unconfirmed(session.pool, now)
        for lease in list(session.leases.values()):
            if lease.state is not SlotState.FENCING:
                self._end_lease(lease, why, now, was_in_lane=was_in_lane, unused_above=unused_above)
        self._slots.mark_returns_due(session, 0)
        self.drop_if_over(session)

    def _log_end(self, session: Session, why: str) -> None:
        held = [lease for lease in session.leases.values() if lease.live is None]  # not parked here
        if held:
            self._log(
                logging.INFO,
                "pool %r: %s: %s; its %d leases are ended",
                session.pool.name,
                session.label,
                why,
                len(held),
                pool=session.pool.name,
                session=session.label,
                reason=why,
            )

    def _end_lease(
        self, lease: Lease, why: str, now: float, *, was_in_lane: bool, unused_above: Token | None
    ) -> None:
        """Fence a lease of an ended session, or free it if its worker never took it up."""
        current = lease.token.epoch == self._terms.epoch
        if was_in_lane and not current:
            spared_until = now + self._terms.ttl_s
            if self._moves.transit.may_have_moved(lease, lease.session, spared_until):
                return
        unused = unused_above is not None and current and lease.token > unused_above
        if lease.findable or not unused:
            # The end of a parked connection is nobody's fault.
            level = logging.INFO if lease.live is None else logging.DEBUG
            self._leases.fence(lease, why, now, level=level)
        else:
            self._leases.free(lease, why)

    def drop_if_over(self, session: Session) -> None:
        """Forget a suspect or ended session without leases, and then a pool without sessions."""
        pool = session.pool
        if session.leases or not (session.suspect or session.ended or session.shelf):
            return
        if not session.shelf:
            if self._slots.sessions.pop(session.id, None) is None:
                return
            if session.id not in pool.former:  # else its process's end tells what it may have
                self._emit(Forget(session.id))
            self._stop_watching(session)
            self._moves.session_ended(session)
            del pool.sessions[session.id]
        if pool.sessions and (pool.shelf is None or len(pool.sessions) > 1 or pool.shelf.leases):
            return
        if pool.shelf is not None:
            del self._slots.sessions[pool.shelf.id]
            pool.sessions.clear()
            pool.shelf = None
        self._moves.pool_discarded(pool)
        self._slots.discard(pool)
        self._sharing.discarded(pool)

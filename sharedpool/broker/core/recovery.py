"""A broker's start after another broker's end: restore what is known, wait for the rest.

With an intact journal there is nothing to wait for. Every lease that may be held is in the records
from the start, suspect until its worker says HELLO.

Without one (it was deleted, or is of another version) nothing is granted until the end of the grace
period, in which the workers report what they hold. Then the server is surveyed: a backend that has
this broker's tag, and that no worker has claimed, stays counted for an unknown worker.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

from sharedpool.broker.core.commands import (
    Entry,
    Erase,
    MarkJournalComplete,
    SurveyResult,
    SurveyServer,
    Watch,
)
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.records import Lease, Pool, Session
from sharedpool.broker.core.session_states import SessionState
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.application_name import pool_of_tag
from sharedpool.wire.messages import START_UP_LIMIT_S
from sharedpool.wire.values import Backend, PoolSpec, Token

UNKNOWN = "unknown worker"
GRACE_OVER = 0  # serial of the surveys that end the grace period


class Recovery:
    """The ledger's first moments.

    `make_pool(spec)` returns the pool of a spec, made if there is none. `find_pool(name, database)`
    returns the pool whose backends have that name in their tags.
    """

    def __init__(
        self,
        context: Context,
        make_pool: Callable[[PoolSpec], Pool],
        find_pool: Callable[[str, str], Pool | None],
    ) -> None:
        self._slots = context.slots
        self._emit = context.emit
        self._log = context.log
        self._make_pool = make_pool
        self._find_pool = find_pool
        self._first_survey_at: float | None = None
        self._starting: frozenset[int] | None = None
        self._last_survey = False
        self.outranked = self.in_grace_period = False
        self.grace_since = self.grace_until = -math.inf

    def begin_grace_period(self, since: float, until: float) -> None:
        """Begin the grace period, or begin it again: surveys before that do not count."""
        self.in_grace_period, self.grace_since, self.grace_until = True, since, until
        self._first_survey_at = self._starting = None
        self._last_survey = False

    def give_way(self) -> None:
        """Grant nothing while another broker counts to the same limit, or may."""
        self.outranked = self._slots.grant_stop.holding_back = True

    def lead(self) -> None:
        """Begin to grant, unless the grace period is not over."""
        self.outranked = False
        if not self.in_grace_period:
            self._emit(MarkJournalComplete())
            self._slots.grant_stop.holding_back = False

    # --- the journal

    def restore(self, entries: Iterable[Entry], now: float, spared_until: float) -> None:
        """Restore a former broker's leases: counted, and fenced only when a waiter needs a slot."""
        restored: dict[bytes, Session] = {}
        entries = list(entries)
        newest = _newest_tokens(entries)
        for entry in entries:
            if entry.backend is not None and newest.get(entry.backend, entry.token) != entry.token:
                # The connection was handed over, but the journal ends before the giver's lease
                # does. That lease must not be fenced: its heir has the backend.
                self._emit(Erase(entry.token))
                continue
            session = restored.get(entry.session)
            if session is None:
                session = self._restore_session(entry, now, spared_until)
                restored[session.id] = session
            self._restore_lease(entry, session, now)
        for session in restored.values():
            self._emit(Watch(session.id, session.process))
        if restored:
            text = "taking over %d leases of %d workers from the former broker"
            self._log(logging.INFO, text, len(self._slots.leases), len(restored))

    def _restore_session(self, entry: Entry, now: float, spared_until: float) -> Session:
        pool = self._make_pool(entry.pool) if entry.pid else self._unnamed(entry.pool)
        session = Session(
            entry.session, entry.pid, entry.host, entry.title, pool, entry.expiration_s, now,
            entry.process, state=SessionState.SUSPECT, restored=True, spared_until=spared_until,
        )  # fmt: skip
        self._slots.sessions[session.id] = pool.sessions[session.id] = session
        return session

    def _restore_lease(self, entry: Entry, session: Session, now: float) -> None:
        slots, pool, backend = self._slots, session.pool, entry.backend
        lease = Lease(
            entry.token, session, pool, backend=backend, granted_at=now, moves=entry.moves
        )  # fmt: skip
        slots.move(lease, SlotState.SUSPECT, "held when the former broker ended")
        if backend is not None and backend.start_us:
            slots.restored[backend] = lease
            pool.note_backend(backend)
        if not entry.pid and backend is not None:
            slots.orphans[backend] = lease

    # --- the end of the grace period

    def order_survey(self, now: float) -> None:
        """Order a survey of the server."""
        if self._first_survey_at is not None:
            self._last_survey = now - self._first_survey_at >= START_UP_LIMIT_S
        self._emit(SurveyServer(GRACE_OVER, barrier=self._first_survey_at is None))

    def complete(self, survey: SurveyResult, now: float) -> bool:
        """Return True if every connect that a former broker's worker has begun has come to its end.

        A backend has no tag while it starts up. Those in start-up at the second survey are waited
        for, until they have a tag or are gone (see `quarantine.py` for why the second).
        """
        if self._first_survey_at is None:
            self._first_survey_at = now
            return False
        self._starting = (
            survey.starting if self._starting is None else self._starting & survey.starting
        )
        return not self._starting or self._last_survey

    def adopt(self, survey: SurveyResult, strangers: Iterable[Backend]) -> None:
        """Count the backends that no worker has claimed, and begin to grant."""
        for backend in strangers:
            name, database = pool_of_tag(survey.tagged[backend]), survey.databases.get(backend, "")
            pool = self._unnamed(PoolSpec(name, 1, 0, database=database))
            lease = Lease(self._slots.new_token(), self._unknown(pool), pool, backend=backend)
            self._slots.move(lease, SlotState.SUSPECT, "claimed by nobody")
            self._slots.orphans[backend] = lease
        if self._slots.orphans:
            text = "no worker has claimed %d connections of this broker: they stay counted"
            self._log(logging.WARNING, text, len(self._slots.orphans))
        self.serve()

    def _unknown(self, pool: Pool) -> Session:
        """Return the session for which a pool's unclaimed backends are counted."""
        session_id = b"unknown:" + pool.name.encode()
        session = pool.sessions.get(session_id)
        if session is None:
            session = Session(session_id, 0, "", UNKNOWN, pool, 0.0, 0.0)
            session.state = SessionState.SUSPECT
            self._slots.sessions[session_id] = pool.sessions[session_id] = session
        return session

    def _unnamed(self, spec: PoolSpec) -> Pool:
        """Return the pool of that name.

        If it is made here, its limit is unknown until a session names it.
        """
        pool = self._find_pool(spec.name, spec.database)
        if pool is None:
            pool = self._make_pool(PoolSpec(spec.name, 1, 0, database=spec.database))
            pool.unnamed = True
            self._slots.assign(pool)
        return pool

    def serve(self) -> None:
        """Begin to grant: every connection that may exist is counted by now."""
        self.in_grace_period = False
        if not self.outranked:
            self._emit(MarkJournalComplete())
            self._slots.grant_stop.holding_back = False
            self._log(logging.INFO, "the grace period is over: serving")


def _newest_tokens(entries: Iterable[Entry]) -> dict[Backend, Token]:
    """Return the newest token of each backend in the journal."""
    newest: dict[Backend, Token] = {}
    for entry in entries:
        if entry.backend is not None and entry.backend.start_us:
            newest[entry.backend] = max(entry.token, newest.get(entry.backend, entry.token))
    return newest

"""A broker's start after another's end: take over what is known, hold back while it is not.

With an intact journal nothing need be waited for: every lease that may be held is in the books from the start, suspect
until its worker says HELLO. Without one (deleted, or another version's) nothing is granted until the grace period has
let the workers say what they hold; backends that carry this broker's tag and that nobody has claimed by then stay
counted, as suspects of an unknown worker.
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
from sharedpool.broker.core.records import Lease, Pool, Session, SlotState
from sharedpool.broker.core.scheduler import Scheduler
from sharedpool.wire.application_name import pool_of_tag
from sharedpool.wire.messages import START_UP_LIMIT_S, Backend, PoolSpec, Token

UNKNOWN = "unknown worker"
GRACE_OVER = 0  # serial of the look with which the grace period ends


class Recovery:
    """The ledger's first moments. `make_pool(spec)` returns a pool of the books, made when it is not there.

    `find_pool(name, database)` returns the pool whose tags show that name.
    """

    def __init__(
        self,
        context: Context,
        scheduler: Scheduler,
        make_pool: Callable[[PoolSpec], Pool],
        find_pool: Callable[[str, str], Pool | None],
    ) -> None:
        self._slots = context.slots
        self._scheduler = scheduler
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
        """Note that the grace period begins, or begins again: what was seen before does not count."""
        self.in_grace_period, self.grace_since, self.grace_until = True, since, until
        self._first_survey_at = self._starting = None
        self._last_survey = False

    def give_way(self) -> None:
        """Grant nothing while another broker counts to the same limit, or may."""
        self.outranked = self._scheduler.holding_back = True

    def lead(self) -> None:
        """Begin to grant, unless the grace period still runs."""
        self.outranked = False
        if not self.in_grace_period:
            self._emit(MarkJournalComplete())
            self._scheduler.holding_back = False

    def restore(self, entries: Iterable[Entry], now: float, spared_until: float) -> None:
        """Put a former broker's leases into the books: counted, and fenced only when somebody waits."""
        slots = self._slots
        restored: dict[bytes, Session] = {}
        entries = list(entries)
        # Handed over, but the journal ends before the giver's lease does: it must not be fenced in its heir's hands.
        heirs: dict[Backend, Token] = {}
        for entry in entries:
            if entry.backend is not None and entry.backend.start_us:
                heirs[entry.backend] = max(entry.token, heirs.get(entry.backend, entry.token))
        for entry in entries:
            if entry.backend is not None and heirs.get(entry.backend, entry.token) != entry.token:
                self._emit(Erase(entry.token))
                continue
            pool = self._make_pool(entry.pool) if entry.pid else self._unnamed(entry.pool)
            session = restored.get(entry.session)
            if session is None:
                session = Session(
                    entry.session, entry.pid, entry.host, entry.title, pool, entry.expiration_s, now,
                    entry.process, restored=True, suspect=True, spared_until=spared_until,
                )  # fmt: skip
                restored[session.id] = slots.sessions[session.id] = pool.sessions[session.id] = (
                    session
                )
            lease = Lease(
                entry.token, session, session.pool, backend=entry.backend, granted_at=now, moves=entry.moves
            )  # fmt: skip
            slots.move(lease, SlotState.SUSPECT, "held when the former broker ended")
            if entry.backend is not None and entry.backend.start_us:
                slots.restored[entry.backend] = lease
                pool.note_backend(entry.backend)
            if not entry.pid and entry.backend is not None:
                slots.orphans[entry.backend] = lease
        for session in restored.values():
            self._emit(Watch(session.id, session.process))
        if restored:
            text = "taking over %d leases of %d workers from the former broker"
            self._log(logging.INFO, text, len(slots.leases), len(restored))

    def order_survey(self, now: float) -> None:
        """Order a look at the server."""
        if self._first_survey_at is not None:
            self._last_survey = now - self._first_survey_at >= START_UP_LIMIT_S
        self._emit(SurveyServer(GRACE_OVER, barrier=self._first_survey_at is None))

    def complete(self, survey: SurveyResult, now: float) -> bool:
        """Say whether all that former brokers' workers have begun to open is open by now, and tagged, or gone.

        A backend has no tag while it starts up: those that a second look shows (see `quarantine.py`) are waited for.
        """
        if self._first_survey_at is None:
            self._first_survey_at = now
            return False
        self._starting = (
            survey.starting if self._starting is None else self._starting & survey.starting
        )
        return not self._starting or self._last_survey

    def adopt(self, survey: SurveyResult, strangers: Iterable[Backend]) -> None:
        """Count backends that nobody has claimed, and begin to serve."""
        for backend in strangers:
            spec = PoolSpec(
                pool_of_tag(survey.tagged[backend]),
                1,
                0,
                database=survey.databases.get(backend, ""),
            )
            pool = self._unnamed(spec)
            session_id = b"unknown:" + pool.name.encode()
            session = pool.sessions.get(session_id)
            if session is None:
                session = Session(session_id, 0, "", UNKNOWN, pool, 0.0, 0.0, suspect=True)
                self._slots.sessions[session_id] = pool.sessions[session_id] = session
            lease = Lease(self._slots.new_token(), session, pool, backend=backend)
            self._slots.move(lease, SlotState.SUSPECT, "claimed by nobody")
            self._slots.orphans[backend] = lease
        if self._slots.orphans:
            text = "%d connections of this broker's are claimed by nobody: they stay counted"
            self._log(logging.WARNING, text, len(self._slots.orphans))
        self.serve()

    def _unnamed(self, spec: PoolSpec) -> Pool:
        """Return the pool of that name; its limit is unknown when it is made here, until a session names it."""
        pool = self._find_pool(spec.name, spec.database)
        if pool is None:
            pool = self._make_pool(PoolSpec(spec.name, 1, 0, database=spec.database))
            pool.unnamed = True
            self._slots.assign(pool)
        return pool

    def serve(self) -> None:
        """Begin to grant. What is still unknown has a lease of its own by now."""
        self.in_grace_period = False
        if not self.outranked:
            self._emit(MarkJournalComplete())
            self._scheduler.holding_back = False
            self._log(logging.INFO, "the grace period is over: serving")

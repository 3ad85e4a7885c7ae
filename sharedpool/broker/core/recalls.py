"""Recalls: how the broker asks a worker process for leases, and what it may expect in return.

A recall asks a session for a number of idle leases now. It also tells the session how many of its
next checkins are to come back (`returns_due`). It has a serial. The session's next RENEW names the
newest recall that it knew when it listed its leases. So an answer tells what is idle *after* the
question, and a lost recall shows as an answer that never comes.

    asked     serial of the newest recall that was sent
    answered  newest recall that an answer has covered
    awaited   recall whose answer an alarm watches for, 0 for none

A session that does not answer within `ANSWER_LIMIT_S` is *unresponsive*: nothing of what it holds
is counted on until its next message.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice

from sharedpool.broker.core.commands import Send
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.records import Pool, Session
from sharedpool.broker.core.session_states import SessionState
from sharedpool.wire.messages import Recall

# A worker that has not answered a recall, or finished a close, for this long is not waited for.
ANSWER_LIMIT_S = 1.0


class Recalls:
    """All recalls of one broker."""

    def __init__(self, context: Context) -> None:
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self.newest = 0  # serial of the newest recall, or of the newest message that acts as one
        # Sessions that the current round (rounds.py) waits for, and the recall to answer.
        self.polled: dict[bytes, int] = {}

    def next_serial(self) -> int:
        """Return the serial for the next message that tells a session what to give back."""
        self.newest += 1
        return self.newest

    # --- asking

    def send(self, session: Session, now: float, *, take: int = 0, expired: bool = False) -> None:
        """Ask a session for `take` idle leases and a list of what it holds; watch for the answer.

        `expired`: it is to give back all leases that were idle for too long.
        """
        session.asked = self.next_serial()
        self._emit(Send(session.id, Recall(session.asked, take, session.returns_due, expired)))
        self._watch_answer(session, now)

    def take_idle(self, pools: Iterable[Pool], most: int, now: float) -> int:
        """Ask for up to `most` idle leases, longest idle first; return for how many."""
        taken: Counter[bytes] = Counter()
        idle = chain.from_iterable(pool.idle.values() for pool in pools)
        for lease in list(islice(idle, most)):
            del lease.pool.idle[lease.token]
            taken[lease.session.id] += 1
        for session_id, count in taken.items():
            session = self._slots.sessions[session_id]
            self._slots.mark_taking(session, session.taking + count)
            session.pool.counters.recalls += count
            self.send(session, now, take=count)
        return taken.total()

    def announce_returns(self, session: Session) -> None:
        """Tell a session how many of its next checkins are to come back; no answer is needed."""
        recall = Recall(self.next_serial(), 0, session.returns_due, answer=False)
        self._emit(Send(session.id, recall))

    # --- answers

    def answered(self, session: Session, serial: int) -> None:
        """Record that a session has listed what it holds, knowing recall `serial`."""
        session.answered = max(session.answered, min(serial, session.asked))
        if session.answered >= session.asked:
            session.expiring = False
            self._slots.mark_taking(session, 0)
        if session.answered >= self.polled.get(session.id, math.inf):
            del self.polled[session.id]

    def expect_no_answer(self, session: Session) -> None:
        """Stop expecting answers from a session that gives none, starts over, or has ended."""
        session.expiring = False
        session.answered = session.asked
        session.draining.clear()
        self._slots.mark_taking(session, 0)
        self.polled.pop(session.id, None)
        self._slots.mark_returns_due(session, session.returns_due)

    def _watch_answer(self, session: Session, now: float) -> None:
        if not session.awaited:
            session.awaited = session.asked
            self._arm(now + ANSWER_LIMIT_S, self._answer_due, session)

    def _answer_due(self, session: Session, now: float) -> None:
        awaited, session.awaited = session.awaited, 0
        if session.answered < awaited:
            self.expect_no_answer(session)
            self._slots.move_session(session, SessionState.UNRESPONSIVE)
        elif session.answered < session.asked:  # asked again meanwhile
            self._watch_answer(session, now)

    def check_invariants(self) -> None:
        """Raise `AssertionError` if a round of refusals waits for an answer that cannot come."""
        for session_id, serial in self.polled.items():
            session = self._slots.sessions[session_id]
            assert not session.silent, session.label
            assert session.answered < serial <= session.asked, session.label

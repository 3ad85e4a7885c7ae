"""Requests that do not wait: refused only when no host has anything idle for them.

1. Where such a request finds nothing here, this host puts a *question* to the others, with its next
   sync.
2. A host that is asked has its workers tell what is idle, and gives that back. When all have told,
   it answers, with a sync.
3. With the last answer, the requests that were there before the question may be refused.
"""

from __future__ import annotations

import math

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.share_records import Share, ShareRecords


class ShareQuestions:
    """The questions of this host, and those that it is to answer."""

    def __init__(self, context: Context, recalls: Recalls, records: ShareRecords) -> None:
        self._slots = context.slots
        self._recalls = recalls
        self._records = records

    def must_ask(self, share: Share) -> bool:
        """Return True if a request that does not wait needs to know what the others have idle."""
        newest = self.newest_nowait(share)
        return not share.alone and newest > share.covered and share.asked_at == math.inf

    def newest_nowait(self, share: Share) -> int:
        """Return the number of the newest request that does not wait; 0 if there is none."""
        pools = self._records.pools(share)
        return max((next(reversed(pool.nowaits)) for pool in pools if pool.nowaits), default=0)

    def inquire(self, share: Share, now: float, question: int = 0) -> None:
        """Ask the workers what is idle, which otherwise they tell with their next heartbeats."""
        share.inquired_at, share.checking = now, max(question, share.checking)
        share.awaited.clear()
        for pool in self._records.pools(share):
            for session in [] if pool.moving else pool.holders:
                self._recalls.send(session, now)
                share.awaited[session.id] = session.asked

    def has_checked(self, share: Share, question: int) -> bool:
        """Return True if all workers have told, after a question of another host, what is idle."""
        if share.checking < question or not self.have_told(share):
            return False
        share.checked = share.checking
        return not (share.division.owed and self._records.has_idle(share))

    def have_told(self, share: Share) -> bool:
        """Return True if all workers have told what is idle since they were last asked."""
        sessions = self._slots.sessions
        for session_id, serial in list(share.awaited.items()):
            session = sessions.get(session_id)
            if session is not None and session.answered < serial and not session.silent:
                return False
            del share.awaited[session_id]
        return True

    def answered(self, share: Share) -> None:
        """Let requests that do not wait be refused: no host has anything idle for this one."""
        share.asked_at = math.inf
        self._records.let_refuse(share, share.covering)

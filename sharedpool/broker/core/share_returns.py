"""What this host gives back to others: how a wake-up becomes slots that they can take.

A host that wants more than it holds wakes the others, and says what it wants. If this host learned
only from a sync what it owes, it would need another one to give that back. Instead:

1. The workers are asked what is idle: else one slot after the other would move. A host that lacks
   slots itself skips this, because it has been woken to take some.
2. When all have answered, or after `_INQUIRY_S`, what this host will owe is forecast from its last
   sync and the wake-up. Idle connections are asked back at once.
3. The next sync gives back what has come by then. It is due as soon as the others can be served,
   or after `_GATHER_S`. It tells what else is owed, which is given back later.

Only a sync changes what is held. A wrong forecast closes some idle connections for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.share_questions import ShareQuestions
from sharedpool.broker.core.share_records import Share, ShareRecords
from sharedpool.broker.core.share_terms import HostRow, ShareKey, Wakeup
from sharedpool.broker.core.shares import Claim, HostShare, decide

# While other hosts lack slots, the workers are asked so often at most, and have so long to answer.
INQUIRY_EVERY_S, _INQUIRY_S = 0.4, 0.005
# Idle connections that are owed come back together, more or less. What nobody waits for may take
# longer: each sync counts against the rate.
_GATHER_S, _GATHER_UNWANTED_S = 0.008, 0.1
_UNHURRIED_S = 0.02
_SOON_S = 0.5
_RETURN_LIMIT_S = 0.05  # after which a sync is due although nothing has come back


class ShareReturns:
    """The returns of one broker. `beat(share, when)` orders a sync at `when` at the latest."""

    def __init__(
        self,
        context: Context,
        records: ShareRecords,
        questions: ShareQuestions,
        beat: Callable[[Share, float], None],
        instance: str,
    ) -> None:
        self._arm = context.timers.arm
        self._records = records
        self._questions = questions
        self._beat = beat
        self._instance = instance
        self._woken: dict[ShareKey, Share] = {}

    # --- wake-ups

    def woken(self, share: Share, wakeup: Wakeup, now: float) -> None:
        """Record a wake-up, and ask the workers what is idle."""
        if any(wakeup.is_of(other) for other in share.others):
            share.news[wakeup.host.instance] = wakeup.host
        is_question = wakeup.asked > share.checking
        lacks = self._records.wanted(share, now) > share.division.held
        if is_question or (not lacks and now - share.inquired_at > INQUIRY_EVERY_S):
            self._questions.inquire(share, now, wakeup.asked)
        if now < share.inquired_at + _INQUIRY_S:
            self._arm(share.inquired_at + _INQUIRY_S, _look_again, share)
        self._woken[share.key] = share

    def forget(self, share: Share) -> None:
        """Forget the wake-ups of a share that is given back, or is no longer shared."""
        self._woken.pop(share.key, None)
        share.asks_back_at = math.inf

    def act(self, now: float) -> None:
        """Ask back what other hosts will be owed, or order the sync that tells it.

        To be called before any grant.
        """
        for share in list(self._woken.values()):
            if share.pending:
                continue  # its outcome may not know of the wake-up
            if now < share.inquired_at + _INQUIRY_S and not self._questions.have_told(share):
                continue
            del self._woken[share.key]
            self._records.active[share.key] = share
            if self._forecast(share, now):
                self._beat(share, now + _RETURN_LIMIT_S)
            else:
                share.due = True

    def _forecast(self, share: Share, now: float) -> bool:
        """Ask idle connections back that this host will owe; return False if there are none."""
        if share.frozen or not share.registered or not share.news:
            return False
        if not self._records.has_idle(share):
            return False
        others = {x.instance: HostShare(x.instance, x.held, x.wanted) for x in share.others}
        others |= share.news
        held = share.division.held
        claim = Claim(self._records.wanted(share, now), self._records.least(share))
        limit = 0 if share.paused else share.max_conn
        division = decide(limit, self._instance, held, claim, others)
        share.lacked = lacked(limit, held, others.values())
        kept = division.held - division.owed
        if now >= share.foreseen_at + _SOON_S:
            # What the others wait for comes first: many closes at once take the longer for each.
            # Who wants more soon after gets the rest at once.
            kept = max(kept, held - share.lacked)
        if kept >= self._records.allowance(share):
            return False
        share.owed_at = share.foreseen_at = now
        share.division = replace(share.division, owed=held - kept)
        self._records.allow(share, kept)
        return True

    # --- returns

    def ask_back(self, share: Share, now: float) -> None:
        """Ask back what is owed by the last sync; what nobody waits for a moment later.

        Many closes at once would delay those who wait just now: their next sync and their connect.
        """
        division = share.division
        if not division.owed or share.lacked or share.paused:
            share.asks_back_at = math.inf
            self._records.allow(share, max(0, division.held - division.owed))
        else:
            self._records.allow(share, division.held)
            share.asks_back_at = now + _UNHURRIED_S
            self._arm(share.asks_back_at, self._ask_back_due, share)

    def _ask_back_due(self, share: Share, now: float) -> None:
        if now >= share.asks_back_at and not share.frozen:
            share.asks_back_at = math.inf
            share.owed_at = now
            self._records.allow(share, max(0, share.division.held - share.division.owed))

    def have_come(self, share: Share, now: float) -> bool:
        """Return True if the others should have what has come back.

        That is all that is owed, all that they lack, or after a moment what there is.
        """
        given = share.division.held - self._records.least(share)
        if given <= 0:
            return False
        if given >= share.division.owed or given >= share.lacked > 0:
            return True
        until = share.owed_at + _GATHER_S
        if not share.lacked:
            until = max(share.owed_at, share.synced_at) + _GATHER_UNWANTED_S
        if now >= until:
            return True
        self._beat(share, until)
        return False


def lacked(limit: int, held: int, others: Iterable[HostShare | HostRow]) -> int:
    """Return how many slots the others want beyond what they hold and what is free."""
    free, wanted = limit - held, 0
    for other in others:
        free -= other.held
        wanted += max(0, other.wanted - other.held)
    return max(0, wanted - max(0, free))


def _look_again(_share: Share, _now: float) -> None:
    """Do nothing: `act` runs after every alarm."""

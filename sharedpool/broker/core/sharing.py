"""This host's shares of the limits that it has in common with other hosts.

The brokers of all hosts meet in a table of the database (`broker/postgres/share_table.py`), in one
transaction at a time, a *sync*. Here is decided when one is due, and what follows from its outcome.
The division itself is in `shares.py`. What is known of each share is in `share_records.py`, what
requests that do not wait need in `share_questions.py`.

1. A limit whose share is not known yet grants nothing: the first sync is ordered with the pool.
2. A broker that is alone holds the whole limit, and syncs only to be heard of.
3. Where there are others, a sync is due when this host wants more than it holds, when it needs
   less while others lack slots, when it has got back what it owes, and when another broker has
   woken it. While slots are short over all hosts, it looks again every `POLL_S`, and as soon as
   a host may be found to be gone.
4. What this host owes comes back like the excess of a limit that an operator has lowered: idle
   connections at once, those in use at their checkins.
5. After some time without a sync nothing new is opened: see `share_trust.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

from sharedpool.broker.core.commands import Command, LeaveShare, SyncShare
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import UNSHARED, Pool
from sharedpool.broker.core.share_questions import ShareQuestions
from sharedpool.broker.core.share_records import BURST, FIRST_RETRY_S, Share, ShareRecords
from sharedpool.broker.core.share_reports import ShareReports
from sharedpool.broker.core.share_returns import INQUIRY_EVERY_S, ShareReturns, lacked
from sharedpool.broker.core.share_terms import (
    NO_CHANGE,
    Failed,
    ShareChange,
    ShareKey,
    SyncFailure,
    SyncResult,
    Wakeup,
)
from sharedpool.broker.core.share_trust import ShareTrust
from sharedpool.broker.core.shares import Claim, Division
from sharedpool.broker.core.table_memory import TableMemory
from sharedpool.wire.values import NO_TOKEN

HEARTBEAT_S = 5.0
POLL_S = 0.5
_PER_SECOND = 4.0  # syncs of one share, after `BURST` at once
_LAST_RETRY_S, _RETRY_UNSHARED_S = 1.0, 60.0
_ANSWER_LIMIT_S = 2.0  # for the other hosts, before a request that does not wait is refused
_UNUSED_S = 2.0  # after which an unused share is given back


class Sharing:
    """All shares of one broker; `settle(now)` schedules, and returns what is to be done.

    `set_paused(pool, paused, now)` pauses or resumes a pool, or all ("").

    Where a limit cannot be shared, `claim_lock` keeps other brokers from it, until `resign_lock`.

    `by_pool` and `cap`: see `ShareRecords`.
    """

    def __init__(
        self,
        context: Context,
        recalls: Recalls,
        settle: Callable[[float], list[Command]],
        set_paused: Callable[[str, bool, float], None],
        claim_lock: Callable[[], None],
        resign_lock: Callable[[], None],
        *,
        by_pool: bool,
        cap: str,
        instance: str,
    ) -> None:
        self._records = ShareRecords(context, by_pool=by_pool, cap=cap)
        self._questions = ShareQuestions(context, recalls, self._records)
        self.returns = ShareReturns(context, self._records, self._questions, self._beat, instance)
        self.trust = ShareTrust(context, self._records)
        self.reports = ShareReports(context, self._records)
        self.shares = self._records.shares
        self._settle = settle
        self._set_paused = set_paused
        self._claim_lock = claim_lock
        self._resign_lock = resign_lock
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._log = context.log
        self._newest = 0  # serial of the newest order

    # --- pools come and go

    def opened(self, pool: Pool) -> None:
        """Order the first sync of a pool's share, if that is not ordered yet."""
        if (key := self._records.key(pool)) is None:
            return
        if key not in self.shares:
            self._begin(self._records.new(key, pool))
        pool.refusable = self.shares[key].covered

    def _begin(self, share: Share) -> None:
        """Grant nothing until the share is known."""
        share.resting, share.due = False, True
        self._records.active[share.key] = share
        self._records.allow(share, 0)
        self._records.let_refuse(share, 0)

    def discarded(self, pool: Pool) -> None:
        """Give the share of a pool back that nobody uses any more."""
        if (share := self._records.of(pool)) is None:
            return
        if share.pool is pool or (share.pool is None and not self._slots.pools):
            self._leave(share)
            del self.shares[share.key]

    def _leave(self, share: Share) -> None:
        self._records.active.pop(share.key, None)
        self.returns.forget(share)
        if not (share.unshared or share.resting):
            self._emit(LeaveShare(share.key))

    def _watch_unused(self, pool: Pool, now: float) -> None:
        """Give the share of a pool back if nothing of it is used for a moment."""
        # A broker that was given a connection string is in its database all the time.
        if (share := self._records.of(pool)) is not None and share.pool is not None:
            share.emptied_at = now
            self._arm(now + _UNUSED_S, self._unused_due, share)

    def _unused_due(self, share: Share, now: float) -> None:
        if not share.pending and self._may_rest(share, now):
            self._rest(share)

    def _may_rest(self, share: Share, now: float) -> bool:
        """Return True if nothing of a share is used, and for long enough."""
        if share.pool is None or not share.registered or now < share.emptied_at + _UNUSED_S:
            return False
        return self._records.is_unused(share)

    def _rest(self, share: Share) -> None:
        """Give a share back that is not in use: nobody is kept from dropping the database."""
        self._leave(share)
        share.resting, share.registered, share.beat_at = True, False, math.inf
        share.division, share.others = Division(0), ()
        share.memory = TableMemory()
        for pool in self._records.pools(share):
            pool.backoff.end()  # the next request asks the server; else it got an error of before
        self._records.allow(share, 0)
        self._records.let_refuse(share, 0)

    # --- after every event

    def update(self, now: float) -> None:
        """Order the syncs that an event has made necessary."""
        while self._slots.emptied:
            self._watch_unused(self._slots.emptied.pop(), now)
        for pool in self._slots.contended.values():
            if pool.allowed == 0 or self._slots.allowed == 0:
                self._wake_resting(pool)
        for share in list(self._records.active.values()):
            if share.pending:
                continue
            if share.due or self._has_news(share, now):
                self._sync(share, now)

    def _wake_resting(self, pool: Pool) -> None:
        if (key := self._records.key(pool)) is not None and self.shares[key].resting:
            self._begin(self.shares[key])

    def _has_news(self, share: Share, now: float) -> bool:
        """Return True if the others should know what has changed here."""
        division, wanted = share.division, self._records.wanted(share, now)
        if division.owed and self.returns.have_come(share, now):
            return True
        question = max(division.asked, share.checking)
        if division.answered < question and self._questions.has_checked(share, question):
            return True
        if wanted > division.held >= share.told:
            return True
        if division.contended and wanted < min(division.held, share.told):
            return True
        return self._questions.must_ask(share)

    def _sync(self, share: Share, now: float) -> None:
        """Order a sync, as soon as its rate allows one."""
        share.due = True
        if self._budget(share, now) < 1.0:
            self._beat(share, now + (1.0 - share.budget) / _PER_SECOND)
            return
        share.budget -= 1.0
        self._newest += 1
        share.due, share.pending = False, self._newest
        share.told = self._records.wanted(share, now)
        asks = self._questions.must_ask(share)
        if asks:
            share.asked_at, share.covering = now, self._questions.newest_nowait(share)
            self._beat(share, now + _ANSWER_LIMIT_S)
        giving = share.division.owed > 0
        least, has_idle = self._records.least(share), self._records.has_idle(share)
        claim = Claim(share.told, least, asks, share.checked, has_idle, giving)
        self._emit(
            SyncShare(
                share.key,
                self._records.own_limit(share),
                claim,
                share.question,
                self._records.backends(share),
                share.change,
                "" if share.pool is None else share.pool.spec.name,
                share.pending,
                share.memory.most,
                share.memory.missed_at(now),
                sure=not share.memory.unsure,
                home="" if share.pool is None else share.pool.spec.shares_database,
            )
        )
        share.memory.ordered(claim.least)

    @staticmethod
    def _budget(share: Share, now: float) -> float:
        """Return how many syncs the rate allows now."""
        share.budget = min(BURST, share.budget + (now - share.budget_at) * _PER_SECOND)
        share.budget_at = now
        return share.budget

    # --- outcomes

    def synced(
        self, key: ShareKey, serial: int, result: SyncResult, began: float, now: float
    ) -> list[Command]:
        """Handle the outcome of a sync that began at `began`.

        Only the newest order's counts: by a newer one, or because the pool has gone meanwhile, the
        row may say something else by now.
        """
        share = self.shares.get(key)
        if share is None or share.pending != serial:
            return self._settle(now)
        division = result.division
        share.change = NO_CHANGE
        self._records.note_limit(share, result.max_conn)
        if result.paused is not share.paused:
            share.paused = result.paused
            self._set_paused("" if share.pool is None else share.pool.name, share.paused, now)
        self.reports.log_moves(share, result)
        first, share.retry_s = not share.registered, FIRST_RETRY_S
        if first or share.frozen:
            for pool in self._records.pools(share):
                pool.backoff.end()
        share.pending, share.registered, share.frozen = 0, True, False
        share.trouble = share.unshared = ""
        if first and not any(each.unshared for each in self.shares.values()):
            self._resign_lock()
        if not (share.division.owed and division.owed):
            share.owed_at = now
        held_before = share.division.held
        share.division, share.others, share.missing = division, result.others, result.missing
        share.max_conn = result.max_conn
        share.lacked = lacked(result.max_conn, division.held, result.others)
        share.news.clear()
        share.memory.synced(result, now)
        share.synced_at = now
        self.trust.renew(share, began)
        self.returns.ask_back(share, now)
        share.question = division.question
        if share.checking > division.asked and share.inquired_at < began:
            share.checking = share.checked = division.asked  # questions are counted anew
        if division.held > held_before:
            share.asked_at = math.inf  # the others had something: who is still unserved asks anew
        elif share.asked_at < math.inf and division.exhausted:
            self._questions.answered(share)
        if division.alone:
            self._records.active.pop(key, None)
            self._records.let_refuse(share, UNSHARED)
        else:
            self._records.active[key] = share
            if share.covered == UNSHARED:
                self._records.let_refuse(share, 0)
        self._prepare_next(share, now, result.again_s)
        return self._settle(now)

    def _prepare_next(self, share: Share, now: float, again_s: float) -> None:
        """Ask the workers what the next sync will have to tell, and set its time.

        After `again_s` a host may be found to be gone.
        """
        division = share.division
        contended = division.contended or division.lacking or division.owed
        share.beat_at = math.inf  # an earlier alarm finds that it is not the one
        if division.answered < division.asked and share.checking < division.asked:
            self._questions.inquire(share, now, division.asked)
        elif division.contended and now - share.inquired_at > INQUIRY_EVERY_S:
            self._questions.inquire(share, now)
        self._beat(share, now + (min(POLL_S, again_s) if contended else HEARTBEAT_S))

    def failed(
        self, key: ShareKey, failure: SyncFailure, now: float, serial: int = 0
    ) -> list[Command]:
        """Handle a sync that failed, or the loss of the session (0): there will be another sync.

        An order that is still to be carried out does not count any more.
        """
        share = self.shares.get(key)
        if share is None or share.resting or serial not in (0, share.pending):
            return self._settle(now)
        share.pending, retry_s = 0, share.retry_s
        share.retry_s = min(2 * retry_s, _LAST_RETRY_S)
        if failure.how is Failed.UNSHARED or (failure.how is Failed.REFUSED and not share.others):
            self._give_up(share, failure)
            if failure.how is Failed.UNSHARED:
                retry_s = _RETRY_UNSHARED_S
        elif not share.unshared:
            # A session that has ended is replaced at once, most of the time: no news.
            self.trust.freeze(share, now, "" if failure.how is Failed.LOST else failure.why)
            if failure.how is Failed.UNREACHABLE:
                for pool in self._records.pools(share):
                    if pool.leases or pool.waiters:  # else the next sync tells who comes then
                        pool.backoff.failed(NO_TOKEN, pool.connected, failure.why, now)
            is_soon_back = failure.how is Failed.LOST and retry_s == FIRST_RETRY_S
            self._records.let_refuse(share, 0 if is_soon_back else UNSHARED)
        self._beat(share, now + retry_s)
        return self._settle(now)

    def _give_up(self, share: Share, failure: SyncFailure) -> None:
        """Count to the limit without the other hosts, as there is no way to share it."""
        if share.unshared != failure.why:
            text = "%s: the limit is not shared with other hosts: %s"
            self._log(logging.WARNING, text, share.title, failure.why)
        share.unshared, share.registered, share.frozen = failure.why, False, False
        self._records.active.pop(share.key, None)
        self.returns.forget(share)
        self._claim_lock()
        self._records.allow(share, UNSHARED)
        self._records.let_refuse(share, UNSHARED)

    def woken(self, key: ShareKey, wakeup: Wakeup, now: float) -> list[Command]:
        """Handle that another broker wants this one to look at the shares."""
        share = self.shares.get(key)
        if share is not None and not (share.unshared or share.resting):
            self.returns.woken(share, wakeup, now)
        return self._settle(now)

    # --- alarms

    def _beat(self, share: Share, when: float) -> None:
        if when < share.beat_at:
            share.beat_at = when
            self._arm(when, self._beat_due, share)

    def _beat_due(self, share: Share, now: float) -> None:
        if self.shares.get(share.key) is not share or now < share.beat_at:
            return  # the share was given back, or an alarm for a later time was set since
        share.beat_at = math.inf
        if now - share.asked_at >= _ANSWER_LIMIT_S:  # somebody does not answer
            self._questions.answered(share)
        if share.pending:
            return
        if self._may_rest(share, now):
            self._rest(share)
            return
        share.due = True
        self._records.active[share.key] = share

    def in_use(self) -> list[ShareKey]:
        """Return the limits of which connections are left that would outlive this broker."""
        return [key for key, share in self.shares.items() if self._records.occupied(share)]

    def limit_changed(self, pool: Pool) -> None:
        """Sync soon: an operator has set this host's limit of a pool, or that over all pools."""
        if (share := self._records.of(pool)) is not None and share.registered:
            share.due = True
            self._records.active[share.key] = share

    # --- operators

    def change(self, pools: Iterable[Pool], change: ShareChange) -> list[str]:
        """Order a change for all hosts; return a line for each limit that it concerns."""
        said = []
        for key in dict.fromkeys(map(self._records.key, pools)):
            share = None if key is None else self.shares.get(key)
            if share is None or share.unshared:
                continue
            share.change = change
            if share.resting:
                self._begin(share)
            share.due = True
            self._records.active[share.key] = share
            said.append(f"{share.title}: told to all hosts that share it")
        return said

    def is_paused(self, pool: Pool) -> bool:
        """Return True if a pool is paused on all hosts."""
        share = self._records.of(pool)
        return share is not None and share.paused

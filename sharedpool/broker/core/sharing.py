"""This host's shares of the limits that it has in common with other hosts.

The brokers of all hosts meet in a table of the database (`broker/postgres/share_table.py`), in one
transaction at a time, a *sync*. Here is decided when one is due, and what follows from its outcome.
The division itself is in `shares.py`.

1. A limit whose share is not known yet grants nothing: the first sync is ordered with the pool.
2. A broker that is alone holds the whole limit, and syncs only to be heard of.
3. Where there are others, a sync is due when this host wants more than it holds, when it needs
   less while others lack slots, when it has got back what it owes, and when another broker has
   woken it. While slots are short over all hosts, it looks again every `POLL_S`.
4. What this host owes comes back like the excess of a limit that an operator has lowered: idle
   connections at once, those in use at their checkins.
5. After `TRUST_S` without a sync nothing new is opened, because the others may take this host for
   gone. What is open is used on.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sharedpool.broker.core.commands import (
    NO_CHANGE,
    Command,
    Failed,
    HostRow,
    LeaveShare,
    ShareChange,
    ShareKey,
    SyncFailure,
    SyncResult,
    SyncShare,
)
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import UNSHARED, Pool
from sharedpool.broker.core.shares import TRUST_S, Claim, Division
from sharedpool.broker.core.table_memory import TableMemory
from sharedpool.wire.reports import HostReport
from sharedpool.wire.values import NO_TOKEN, Holder

HEARTBEAT_S = 5.0
POLL_S = 0.5
# A connection that is idle for less counts as wanted, unless another host asks for a request that
# does not wait: one that is idle between two requests does not move to another host and back.
_GAP_S = 0.05
# While other hosts lack slots, the workers are asked so often at most, and have so long to answer.
_INQUIRY_EVERY_S, _INQUIRY_S = 0.4, 0.005
# Syncs of one share: so many at once, and so many a second after that.
_BURST, _PER_SECOND = 6.0, 4.0
_FIRST_RETRY_S, _LAST_RETRY_S, _RETRY_UNSHARED_S = 0.05, 1.0, 60.0
_ANSWER_LIMIT_S = 2.0  # for the other hosts, before a request that does not wait is refused
_GATHER_S = 0.008  # idle connections that are owed come back together, more or less
_UNUSED_S = 2.0  # after which an unused share is given back
_LONGEST_SCOPE = 200  # characters


@dataclass(slots=True, eq=False)
class Share:
    """The share of one limit: a pool's own, or that over all pools (`pool` is None)."""

    key: ShareKey
    pool: Pool | None
    division: Division = field(default_factory=lambda: Division(0))
    others: tuple[HostRow, ...] = ()  # as they were at the last sync
    memory: TableMemory = field(default_factory=TableMemory)
    registered: bool = False
    resting: bool = False  # it was given back while nobody uses the limit here
    unshared: str = ""  # why the limit is this host's own
    change: ShareChange = NO_CHANGE  # ordered for all hosts, and not told yet
    paused: bool = False  # for all hosts

    # --- syncs
    pending: int = 0  # the serial of the one under way, whose outcome will count; 0: none
    due: bool = False  # as soon as the rate allows
    told: int = 0  # what the others know that this host wants
    trusted_until: float = -math.inf
    synced_at: float = -math.inf
    owed_at: float = -math.inf  # since when it owes slots
    inquired_at: float = -math.inf  # when the workers were last asked what is idle,
    awaited: dict[bytes, int] = field(default_factory=dict)  # who was, by which recall,
    checking: int = 0  # and for which question of another host
    checked: int = 0  # the newest of these that all have answered
    frozen: bool = False  # nothing is opened before the next sync
    trouble: str = ""  # why it is frozen
    budget: float = _BURST
    budget_at: float = 0.0
    beat_at: float = math.inf  # when the next alarm is due
    retry_s: float = _FIRST_RETRY_S  # after the next failure

    # --- requests that do not wait
    question: int = 0  # the newest that this host has put to the others
    asked_at: float = math.inf
    covering: int = 0  # the newest request for which the others are asked,
    covered: int = 0  # and for which they have answered

    @property
    def alone(self) -> bool:
        """Return True if this host may have the whole limit, as nobody else wants any of it."""
        return self.registered and self.division.alone


class Sharing:
    """All shares of one broker; `settle(now)` schedules, and returns what is to be done.

    `set_paused(pool, paused, now)` pauses or resumes a pool, or all ("").

    Where a limit cannot be shared, `claim_lock` keeps other brokers from it, until `resign_lock`.

    `by_pool`: each pool's limit is shared. `cap`: the limit over all pools is, under this name.
    Neither: none is.
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
    ) -> None:
        self._recalls = recalls
        self._settle = settle
        self._set_paused = set_paused
        self._claim_lock = claim_lock
        self._resign_lock = resign_lock
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._log = context.log
        self._by_pool = by_pool
        self._cap = ShareKey("", _scope("broker", cap)) if cap else None
        self._newest = 0  # serial of the newest order
        self.shares: dict[ShareKey, Share] = {}
        # Those to be looked at after every event: not those of a broker that is alone.
        self._active: dict[ShareKey, Share] = {}
        self.trust_ends = math.inf  # of the share that is trusted for the shortest time

    # --- pools come and go

    def opened(self, pool: Pool) -> None:
        """Order the first sync of a pool's share, if that is not ordered yet."""
        if (key := self._key(pool)) is None:
            return
        if key not in self.shares:
            share = self.shares[key] = Share(key, pool if self._cap is None else None)
            self._begin(share)
        pool.refusable = self.shares[key].covered

    def _key(self, pool: Pool) -> ShareKey | None:
        """Return the limit that a pool counts to, if it is shared."""
        if self._cap is not None or not self._by_pool or pool.unnamed:
            return self._cap
        return ShareKey(pool.spec.database, _scope("pool", pool.spec.name))

    def _begin(self, share: Share) -> None:
        """Grant nothing until the share is known."""
        share.resting, share.due = False, True
        self._active[share.key] = share
        self._allow(share, 0)
        self._let_refuse(share, 0)

    def discarded(self, pool: Pool) -> None:
        """Give the share of a pool back that nobody uses any more."""
        key = self._key(pool)
        if key is None or (share := self.shares.get(key)) is None:
            return
        if share.pool is pool or (share.pool is None and not self._slots.pools):
            self._leave(share)
            del self.shares[key]

    def _leave(self, share: Share) -> None:
        self._active.pop(share.key, None)
        if not (share.unshared or share.resting):
            self._emit(LeaveShare(share.key))

    def _watch_unused(self, pool: Pool, now: float) -> None:
        """Give the share of a pool back if nothing of it is used for a moment."""
        key = self._key(pool)
        if key is not None and (share := self.shares.get(key)) is not None:
            self._arm(now + _UNUSED_S, self._unused_due, share)

    def _unused_due(self, share: Share, now: float) -> None:
        if share.registered and not share.pending and self._is_unused(share):
            self._rest(share)

    def _is_unused(self, share: Share) -> bool:
        used = any(pool.leases or pool.waiters for pool in self._pools(share))
        return not (used or share.paused)  # without any share there would be no pause

    def _rest(self, share: Share) -> None:
        """Give a share back that is not in use: nobody is kept from dropping the database."""
        self._leave(share)
        share.resting, share.registered, share.beat_at = True, False, math.inf
        share.division, share.others = Division(0), ()
        share.memory = TableMemory()
        self._allow(share, 0)

    # --- after every event

    def expire(self, now: float) -> None:
        """Freeze the shares that are not trusted any more; to be called before any grant."""
        self.trust_ends = math.inf
        for share in self.shares.values():
            if not share.registered or share.unshared or share.frozen:
                continue
            if share.trusted_until <= now:
                self._freeze(share, now, f"no look at the other hosts' shares for {TRUST_S:.0f} s")
            else:
                self.trust_ends = min(self.trust_ends, share.trusted_until)

    def suspended(self, now: float) -> None:
        """Freeze all shares: this process did not run, and others may have taken it for gone."""
        for share in self.shares.values():
            if share.registered and not share.unshared:
                self._freeze(share, now, "")
                share.due, share.pending = True, 0  # the outcome of a sync before that is too old

    def _freeze(self, share: Share, now: float, why: str) -> None:
        """Open nothing more until the next sync."""
        if now >= share.trusted_until and not share.frozen:
            share.memory.silent()
        if why and not share.trouble:
            self._log(logging.WARNING, "%s: opening nothing: %s", _title(share), why)
        share.frozen, share.trouble = True, why or share.trouble
        self._active[share.key] = share
        self._allow(share, min(self._allowance(share), self._occupied(share)))

    def update(self, now: float) -> None:
        """Order the syncs that an event has made necessary."""
        while self._slots.emptied:
            self._watch_unused(self._slots.emptied.pop(), now)
        for pool in self._slots.contended.values():
            if pool.allowed == 0 or self._slots.allowed == 0:
                self._wake_resting(pool)
        for share in list(self._active.values()):
            if share.frozen:
                self._allow(share, min(self._allowance(share), self._occupied(share)))
            if share.pending:
                continue
            if share.due or self._has_news(share, now):
                self._sync(share, now)

    def _wake_resting(self, pool: Pool) -> None:
        if (key := self._key(pool)) is not None and self.shares[key].resting:
            self._begin(self.shares[key])

    def _has_news(self, share: Share, now: float) -> bool:
        """Return True if the others should know what has changed here."""
        division, wanted = share.division, self._wanted(share, now)
        if division.owed and self._has_given_back(share, now):
            return True
        question = max(division.asked, share.checking)
        if division.answered < question and self._has_checked(share, question):
            return True
        if wanted > division.held >= share.told:
            return True
        if division.contended and wanted < min(division.held, share.told):
            return True
        return self._must_ask(share)

    def _has_given_back(self, share: Share, now: float) -> bool:
        """Return True if the others should have what has come back: all, or after a moment."""
        given = share.division.held - self._least(share)
        if given <= 0:
            return False
        if given >= share.division.owed or now >= share.owed_at + _GATHER_S:
            return True
        self._beat(share, share.owed_at + _GATHER_S)
        return False

    def _must_ask(self, share: Share) -> bool:
        """Return True if a request that does not wait needs to know what the others have idle."""
        newest = self._newest_nowait(share)
        return not share.alone and newest > share.covered and share.asked_at == math.inf

    def _newest_nowait(self, share: Share) -> int:
        """Return the number of the newest request that does not wait; 0 if there is none."""
        pools = self._pools(share)
        return max((next(reversed(pool.nowaits)) for pool in pools if pool.nowaits), default=0)

    def _sync(self, share: Share, now: float) -> None:
        """Order a sync, as soon as its rate allows one."""
        share.due = True
        if self._budget(share, now) < 1.0:
            self._beat(share, now + (1.0 - share.budget) / _PER_SECOND)
            return
        share.budget -= 1.0
        self._newest += 1
        share.due, share.pending = False, self._newest
        share.told = self._wanted(share, now)
        asks = self._must_ask(share)
        if asks:
            share.asked_at, share.covering = now, self._newest_nowait(share)
            self._beat(share, now + _ANSWER_LIMIT_S)
        giving = share.division.owed > 0
        claim = Claim(
            share.told, self._least(share), asks, share.checked, self._has_idle(share), giving
        )
        self._emit(
            SyncShare(
                share.key,
                self._own_limit(share),
                claim,
                share.question,
                self._backends(share),
                share.change,
                "" if share.pool is None else share.pool.spec.name,
                share.pending,
                share.memory.most,
                share.memory.missed_at(now),
                sure=not share.memory.unsure,
            )
        )
        share.memory.ordered(claim.least)

    @staticmethod
    def _budget(share: Share, now: float) -> float:
        """Return how many syncs the rate allows now."""
        share.budget = min(_BURST, share.budget + (now - share.budget_at) * _PER_SECOND)
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
        self._note_limit(share, result.max_conn)
        if result.paused is not share.paused:
            share.paused = result.paused
            self._set_paused("" if share.pool is None else share.pool.name, share.paused, now)
        self._log_moves(share, result)
        first, share.retry_s = not share.registered, _FIRST_RETRY_S
        if first or share.frozen:
            for pool in self._pools(share):
                pool.backoff.end()
        share.pending, share.registered, share.frozen = 0, True, False
        share.trouble = share.unshared = ""
        if first and not any(each.unshared for each in self.shares.values()):
            self._resign_lock()
        if not (share.division.owed and division.owed):
            share.owed_at = now
        held_before = share.division.held
        share.division, share.others = division, result.others
        share.memory.synced(result, now)
        share.trusted_until, share.synced_at = began + TRUST_S, now
        self.trust_ends = min(self.trust_ends, share.trusted_until)
        self._allow(share, max(0, division.held - division.owed))
        share.question = division.question
        if division.held > held_before:
            share.asked_at = math.inf  # the others had something: who is still unserved asks anew
        elif share.asked_at < math.inf and division.exhausted:
            self._answered(share)
        if division.alone:
            self._active.pop(key, None)
            self._let_refuse(share, UNSHARED)
        else:
            self._active[key] = share
            if share.covered == UNSHARED:
                self._let_refuse(share, 0)
        contended = division.contended or division.lacking or division.owed
        share.beat_at = math.inf  # an earlier alarm finds that it is not the one
        if division.answered < division.asked and share.checking < division.asked:
            self._inquire(share, now, division.asked)
        self._beat(share, now + (POLL_S if contended else HEARTBEAT_S))
        return self._settle(now)

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
            self._freeze(share, now, "" if failure.how is Failed.LOST else failure.why)
            if failure.how is Failed.UNREACHABLE:
                for pool in self._pools(share):
                    pool.backoff.failed(NO_TOKEN, pool.connected, failure.why, now)
            self._let_refuse(share, UNSHARED)
        self._beat(share, now + retry_s)
        return self._settle(now)

    def _give_up(self, share: Share, failure: SyncFailure) -> None:
        """Count to the limit without the other hosts, as there is no way to share it."""
        if share.unshared != failure.why:
            text = "%s: the limit is not shared with other hosts: %s"
            self._log(logging.WARNING, text, _title(share), failure.why)
        share.unshared, share.registered, share.frozen = failure.why, False, False
        self._active.pop(share.key, None)
        self._claim_lock()
        self._allow(share, UNSHARED)
        self._let_refuse(share, UNSHARED)

    def woken(self, key: ShareKey, now: float, asked: int = 0) -> list[Command]:
        """Handle that another broker wants this one to look at the shares.

        The workers are asked first what is idle: else one slot after the other would move. `asked`
        is the newest question of any host.
        """
        share = self.shares.get(key)
        if share is not None and not (share.unshared or share.resting):
            self._active[key] = share
            is_new = asked > share.checking or now - share.inquired_at > _INQUIRY_EVERY_S
            if is_new and self._inquire(share, now, asked):
                self._beat(share, now + _INQUIRY_S)
            else:
                share.due = True
        return self._settle(now)

    def _inquire(self, share: Share, now: float, question: int = 0) -> bool:
        """Ask the workers what is idle, which otherwise they tell with their next heartbeats."""
        share.inquired_at, share.checking = now, max(question, share.checking)
        share.awaited.clear()
        for pool in self._pools(share):
            for session in [] if pool.moving else pool.holders:
                self._recalls.send(session, now)
                share.awaited[session.id] = session.asked
        return bool(share.awaited)

    def _has_checked(self, share: Share, question: int) -> bool:
        """Return True if all workers have told, after a question of another host, what is idle."""
        if share.checking < question:
            return False
        sessions = self._slots.sessions
        for session_id, serial in list(share.awaited.items()):
            session = sessions.get(session_id)
            if session is not None and session.answered < serial and not session.silent:
                return False
            del share.awaited[session_id]
        share.checked = share.checking
        return not (share.division.owed and self._has_idle(share))

    def _answered(self, share: Share) -> None:
        """Let requests that do not wait be refused: no host has anything idle for this one."""
        share.asked_at = math.inf
        self._let_refuse(share, share.covering)

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
            self._answered(share)
        if share.pending:
            return
        if share.registered and self._is_unused(share):
            self._rest(share)
            return
        share.due = True
        self._active[share.key] = share

    def in_use(self) -> list[ShareKey]:
        """Return the limits of which connections are left that would outlive this broker."""
        return [key for key, share in self.shares.items() if self._occupied(share)]

    # --- operators

    def change(self, pools: Iterable[Pool], change: ShareChange) -> list[str]:
        """Order a change for all hosts; return a line for each limit that it concerns."""
        said = []
        for key in dict.fromkeys(map(self._key, pools)):
            share = None if key is None else self.shares.get(key)
            if share is None or share.unshared:
                continue
            share.change = change
            if share.resting:
                self._begin(share)
            share.due = True
            self._active[share.key] = share
            said.append(f"{_title(share)}: told to all hosts that share it")
        return said

    def is_paused(self, pool: Pool) -> bool:
        """Return True if a pool is paused on all hosts."""
        key = self._key(pool)
        share = None if key is None else self.shares.get(key)
        return share is not None and share.paused

    # --- reports

    def report(self, now: float) -> list[HostReport]:
        """Return the shares of all limits that are not this host's alone, its own first."""
        found: list[HostReport] = []
        for share in self.shares.values():
            trouble = share.unshared and f"not shared with other hosts: {share.unshared}"
            if share.frozen:
                trouble = f"opening nothing until other hosts' shares are known: {share.trouble}"
            if not (share.others or trouble):
                continue
            pool = "" if share.pool is None else share.pool.name
            age_s = max(0.0, now - share.synced_at)
            held, wanted = share.division.held, self._wanted(share, now)
            age_ms = int(age_s * 1000) if share.registered else 0
            found.append(HostReport(pool, "", "", held, wanted, age_ms, True, trouble))
            found += [
                HostReport(
                    pool,
                    other.host,
                    other.instance,
                    other.held,
                    other.wanted,
                    int((other.silent_s + age_s) * 1000),
                    other.connected,
                )
                for other in share.others
            ]
        return found

    def other_holders(self, pool: Pool) -> list[Holder]:
        """Return what other hosts hold of a pool's limit, for the text of an error."""
        key = self._key(pool)
        share = None if key is None else self.shares.get(key)
        others = () if share is None else share.others
        return [Holder(f"host {other.host}", other.held, 0) for other in others if other.held]

    # --- the records

    def _pools(self, share: Share) -> Iterable[Pool]:
        return self._slots.pools.values() if share.pool is None else (share.pool,)

    def _occupied(self, share: Share) -> int:
        return len(self._slots.leases if share.pool is None else share.pool.leases)

    def _allowance(self, share: Share) -> int:
        return self._slots.allowed if share.pool is None else share.pool.allowed

    def _least(self, share: Share) -> int:
        if self._slots.grant_stop.holding_back:
            return UNSHARED  # what is held is not known yet: nothing can be given back
        return max(self._allowance(share), self._occupied(share))

    def _own_limit(self, share: Share) -> int:
        if share.pool is None:
            assert self._slots.max_conn is not None
            return self._slots.max_conn
        return share.pool.spec.max_conn

    def _backends(self, share: Share) -> tuple[tuple[int, int], ...]:
        leases = self._slots.leases if share.pool is None else share.pool.leases
        found = (lease.backend for lease in leases.values())
        return tuple((each.pid, each.start_us) for each in found if each is not None)

    def _has_idle(self, share: Share) -> bool:
        return any(pool.idle or pool.parked or pool.coming for pool in self._pools(share))

    def _wanted(self, share: Share, now: float) -> int:
        """Return how many slots this host needs, or has needed a moment ago."""
        wanted = 0
        for pool in self._pools(share):
            unused = 0
            if not pool.moving:
                since = now - (0.0 if share.checking > share.division.answered else _GAP_S)
                unused = sum(
                    (now if x.idle_since is None else x.idle_since) <= since
                    for x in pool.idle.values()
                )
            wanted += len(pool.leases) - unused + (0 if pool.paused else len(pool.waiters))
        return wanted

    def _allow(self, share: Share, allowed: int) -> None:
        """Set how many slots may be in use on this host; what is in excess comes back."""
        if share.pool is None:
            self._slots.allowed = allowed
        else:
            share.pool.allowed = allowed
        for pool in self._pools(share):
            if pool.leases:
                self._slots.shrink(pool)

    def _let_refuse(self, share: Share, newest: int) -> None:
        """Let requests up to this number be refused, as far as other hosts are concerned."""
        share.covered = newest
        for pool in self._pools(share):
            pool.refusable = newest

    def _note_limit(self, share: Share, max_conn: int) -> None:
        """Take over the limit that all hosts share: that of the first one to come."""
        asked = self._own_limit(share)
        if share.pool is not None:
            known, share.pool.max_conn = share.pool.max_conn, max_conn
        else:
            known = self._slots.max_conn or 0
        if max_conn not in (asked, known):
            text = "%s: its limit is %d for all hosts, not the %d that are asked for here"
            self._log(logging.WARNING, text, _title(share), max_conn, asked)

    def _log_moves(self, share: Share, result: SyncResult) -> None:
        before, now = share.division, result.division
        for line in result.events:
            self._log(logging.WARNING, "%s: %s", _title(share), line)
        if share.registered and before.held != now.held and not (before.alone and now.alone):
            why = "others lack slots" if now.held < before.held else "wanted here"
            text = "%s: this host's share is %d of %d now, before %d (%s)"
            self._log(
                logging.INFO, text, _title(share), now.held, result.max_conn, before.held, why
            )


def _title(share: Share) -> str:
    return "limit over all pools" if share.pool is None else f"pool {share.pool.name!r}"


def _scope(kind: str, name: str) -> str:
    """Return the name of a limit in the table: plain ASCII, and not too long."""
    scope = f"{kind} {name}".encode("ascii", "backslashreplace").decode()
    if len(scope) > _LONGEST_SCOPE:
        digest = hashlib.blake2s(scope.encode(), digest_size=8).hexdigest()
        scope = f"{scope[: _LONGEST_SCOPE - len(digest) - 1]}~{digest}"
    return scope

"""What this host records of each limit that it has in common with other hosts.

Read from the ledger's records, and written to them: how many slots of a limit are in use here, and
how many may be. When a host looks at the shares of the others is decided in `sharing.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.demand import waiting_in_lane
from sharedpool.broker.core.records import UNSHARED, Pool
from sharedpool.broker.core.share_terms import NO_CHANGE, HostRow, ShareChange, ShareKey
from sharedpool.broker.core.shares import Division, HostShare
from sharedpool.broker.core.table_memory import TableMemory
from sharedpool.digests import digest_of

BURST = 6.0  # syncs of one share: so many at once
FIRST_RETRY_S = 0.05
# A connection that is idle for less counts as wanted, unless another host asks for a request that
# does not wait: one that is idle between two requests does not move to another host and back.
_GAP_S = 0.05
_LONGEST_SCOPE = 200  # characters


@dataclass(slots=True, eq=False)
class Share:
    """The share of one limit: a pool's own, or that over all pools (`pool` is None)."""

    key: ShareKey
    pool: Pool | None
    division: Division = field(default_factory=lambda: Division(0))
    others: tuple[HostRow, ...] = ()  # as they were at the last sync
    # What others have told since, by their brokers' instances.
    news: dict[str, HostShare] = field(default_factory=dict)
    max_conn: int = 0  # of all hosts together
    memory: TableMemory = field(default_factory=TableMemory)
    registered: bool = False
    missing: tuple[str, ...] = ()  # hosts whose shares were lost with the server
    resting: bool = False  # it was given back while nobody uses the limit here
    emptied_at: float = -math.inf  # when the last lease here has ended
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
    lacked: int = 0  # how many of those others wait for
    foreseen_at: float = -math.inf  # when it was last forecast what it would owe
    asks_back_at: float = math.inf  # when those are asked back that nobody waits for
    inquired_at: float = -math.inf  # when the workers were last asked what is idle,
    awaited: dict[bytes, int] = field(default_factory=dict)  # who was, by which recall,
    checking: int = 0  # and for which question of another host
    checked: int = 0  # the newest of these that all have answered
    frozen: bool = False  # nothing is opened before the next sync
    trouble: str = ""  # why it is frozen
    budget: float = BURST
    budget_at: float = 0.0
    beat_at: float = math.inf  # when the next alarm is due
    retry_s: float = FIRST_RETRY_S  # after the next failure

    # --- requests that do not wait
    question: int = 0  # the newest that this host has put to the others
    asked_at: float = math.inf
    covering: int = 0  # the newest request for which the others are asked,
    covered: int = 0  # and for which they have answered

    @property
    def alone(self) -> bool:
        """Return True if this host may have the whole limit, as nobody else wants any of it."""
        return self.registered and self.division.alone

    @property
    def title(self) -> str:
        """What the limit is called in the log."""
        return "limit over all pools" if self.pool is None else f"pool {self.pool.name!r}"


class ShareRecords:
    """The shares of one broker.

    `by_pool`: each pool's limit is shared. `cap`: the limit over all pools is, under this name.
    Neither: none is.
    """

    def __init__(self, context: Context, *, by_pool: bool, cap: str) -> None:
        self._slots = context.slots
        self._log = context.log
        self._by_pool = by_pool
        self._cap = ShareKey("", scope_name("broker", cap)) if cap else None
        self.shares: dict[ShareKey, Share] = {}
        # Those to be looked at after every event: not those of a broker that is alone.
        self.active: dict[ShareKey, Share] = {}

    def new(self, key: ShareKey, pool: Pool) -> Share:
        """Record the share of a limit that this pool is the first to use."""
        share = self.shares[key] = Share(key, pool if self._cap is None else None)
        return share

    def of(self, pool: Pool) -> Share | None:
        """Return the share of the limit that a pool counts to; None if that is not shared."""
        key = self.key(pool)
        return None if key is None else self.shares.get(key)

    def key(self, pool: Pool) -> ShareKey | None:
        """Return the limit that a pool counts to, if it is shared."""
        if self._cap is not None or not self._by_pool or pool.unnamed:
            return self._cap
        return ShareKey(pool.spec.database, scope_name("pool", pool.spec.name))

    def is_unused(self, share: Share) -> bool:
        """Return True if the share can be given back: nobody here uses the limit.

        Not without a session, in which the other hosts are told.
        """
        used = share.frozen or any(pool.leases or pool.waiters for pool in self.pools(share))
        return not (used or share.paused)  # without any share there would be no pause

    def pools(self, share: Share) -> Iterable[Pool]:
        """Return the pools that count to a limit."""
        return self._slots.pools.values() if share.pool is None else (share.pool,)

    def occupied(self, share: Share) -> int:
        """Return how many slots of a limit are in use here."""
        return len(self._slots.leases if share.pool is None else share.pool.leases)

    def allowance(self, share: Share) -> int:
        """Return how many slots of a limit may be in use here."""
        return self._slots.allowed if share.pool is None else share.pool.allowed

    def least(self, share: Share) -> int:
        """Return how many slots this host cannot do without: in use, or granted at any moment."""
        if self._slots.grant_stop.holding_back:
            return UNSHARED  # what is held is not known yet: nothing can be given back
        return max(self.allowance(share), self.occupied(share))

    def own_limit(self, share: Share) -> int:
        """Return the limit that is asked for on this host."""
        if share.pool is None:
            assert self._slots.max_conn is not None
            return self._slots.max_conn
        return self._slots.limit(share.pool.name, share.pool.spec)

    def backends(self, share: Share) -> tuple[tuple[int, int], ...]:
        """Return the known backends of a limit's leases: pid and start time."""
        leases = self._slots.leases if share.pool is None else share.pool.leases
        found = (lease.backend for lease in leases.values())
        return tuple((each.pid, each.start_us) for each in found if each is not None)

    def has_idle(self, share: Share) -> bool:
        """Return True if any connection is idle here, or on its way back."""
        return any(pool.idle or pool.parked or pool.coming for pool in self.pools(share))

    def wanted(self, share: Share, now: float) -> int:
        """Return how many slots this host needs, or has needed a moment ago."""
        wanted = 0
        for pool in self.pools(share):
            unused = pool.coming  # asked back, or being closed: no longer among the idle ones
            if not pool.moving:
                unused += len(pool.parked)  # taken from the lane's shelf when the moves halted
                since = now - (0.0 if share.checking > share.division.answered else _GAP_S)
                unused += sum(
                    (now if x.idle_since is None else x.idle_since) <= since
                    for x in pool.idle.values()
                )
            # A worker may have lent what it was asked back for: then `coming` counts too many.
            wanted += max(0, len(pool.leases) - unused)
            # While connections move, most threads wait in the lane, and have asked no broker.
            waiting = max(len(pool.waiters), waiting_in_lane(pool) if pool.moving else 0)
            wanted += 0 if pool.paused else waiting
        return wanted

    def allow(self, share: Share, allowed: int) -> None:
        """Set how many slots may be in use on this host; what is in excess comes back."""
        if share.pool is None:
            self._slots.allowed = allowed
        else:
            share.pool.allowed = allowed
        for pool in self.pools(share):
            if pool.leases:
                self._slots.shrink(pool)

    def allow_no_more(self, share: Share) -> None:
        """Let nothing be opened beyond what is open."""
        self.allow(share, min(self.allowance(share), self.occupied(share)))

    def let_refuse(self, share: Share, newest: int) -> None:
        """Let requests up to this number be refused, as far as other hosts are concerned."""
        share.covered = newest
        for pool in self.pools(share):
            pool.refusable = newest

    def note_limit(self, share: Share, max_conn: int) -> None:
        """Take over the limit that all hosts share: that of the first one to come."""
        asked = self.own_limit(share)
        if share.pool is not None:
            known = share.pool.max_conn
            share.pool.max_conn = min(max_conn, self._slots.limits.get(share.pool.name, max_conn))
        else:
            known = self._slots.max_conn or 0
        if max_conn not in (asked, known):
            text = "%s: its limit is %d for all hosts, not the %d that are asked for here"
            self._log(logging.WARNING, text, share.title, max_conn, asked)


def scope_name(kind: str, name: str) -> str:
    """Return the name of a limit in the table: plain ASCII, and not too long."""
    scope = f"{kind} {name}".encode("ascii", "backslashreplace").decode()
    if len(scope) > _LONGEST_SCOPE:
        digest = digest_of(scope.encode()).hex()
        scope = f"{scope[: _LONGEST_SCOPE - len(digest) - 1]}~{digest}"
    return scope

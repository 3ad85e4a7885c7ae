"""One sync as a decision: what a broker writes into the table of the shares, and what it learns.

Pure: `broker/postgres/share_table.py` reads the rows before, and writes what is decided after, in
one transaction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sharedpool.broker.core.commands import SyncShare
from sharedpool.broker.core.host_presence import SILENT_S, Listed, Presence
from sharedpool.broker.core.share_terms import HostRow, LimitRow, SyncResult
from sharedpool.broker.core.shares import HostShare, decide

# So soon after a restart of the server every host that runs has its share again. A machine that was
# started anew, with a new broker, has nobody to wait for, and is not kept waiting for longer.
BACK_S = 3.0
_NAMED = 5  # hosts in a line of the log
# How old the server's list of sessions may be: in any case, where this host lacks slots, and, for
# the hosts of a contended limit together, how often it is looked at, as long as that suffices.
OLD_S, _LACKING_S, _TOGETHER_S = 2.0, 0.2, 0.05


class SyncDecision(NamedTuple):
    """What becomes of the table. The broker's own row gets the division's numbers."""

    result: SyncResult
    asked: int  # the limit's newest question
    gone: tuple[str, ...]  # instances whose rows are deleted
    lowered: Mapping[str, int]  # instances whose shares are lowered: their hosts cannot use more
    unnamed: str  # for the broker's own row
    silent: tuple[Listed, ...]  # hosts whose sessions are to be ended, because this one lacks slots
    to_wake: tuple[str, ...]  # instances that are notified
    hosts: tuple[str, ...]  # instances that have shares, or had before they were lost
    lost: bool  # shares are missing: the table was emptied


def decide_sync(
    me: str,
    order: SyncShare,
    limit: LimitRow,
    rows: Sequence[Listed],
    presence: Presence,
) -> SyncDecision:
    """Decide a sync of the instance `me`; `limit`, `rows`: the tables'."""
    mine = next((row for row in rows if row.instance == me), None)
    others = [row for row in rows if row.instance != me]
    # By the database, too: one session may serve several, whose pools have one name.
    backends = frozenset(order.backends)
    seen = presence.judge("\0".join(order.key), others, backends)
    others = [
        row._replace(held=seen.lowered.get(row.instance, row.held))
        for row in others
        if row.instance not in seen.gone
    ]
    missing = _missing(me, limit, rows)
    change = order.change
    is_changed = bool(change.max_conn) or change.paused not in (None, limit.paused)
    max_conn = change.max_conn or (limit.max_conn if others else order.max_conn)
    paused = limit.paused if change.paused is None else change.paused
    bounded = _is_bounded(me, order, rows, missing)
    known = [me, *(row.instance for row in rows)]
    taken = presence.strangers(order.pool, order.key.database, known, backends)
    division = decide(
        # While paused, nobody may hold more than it has in use.
        0 if paused else max(0, max_conn - taken),
        me,
        0 if mine is None else mine.held,
        order.claim,
        {x.instance: _share(x, silent=x.instance in seen.silent) for x in others},
        told=0 if mine is None else mine.wanted,
        asked=limit.asked,
        answered=0 if mine is None else mine.answered,
        question=order.question,
        most=order.most if bounded else max_conn,
    )
    if taken or missing:  # perhaps by a host that has left since the server was looked at
        division = replace(division, alone=False, exhausted=False)
    hosts = tuple(
        HostRow(
            _shown(x.host),
            _shown(x.instance),
            x.held,
            x.wanted,
            x.silent_s,
            x.silent_s < SILENT_S or x.instance in seen.connected,
            x.pid,
        )
        for x in others
    )
    names = tuple(map(_shown, missing))
    events = seen.events
    if missing and limit.lost_s is None:
        events += (f"shares were lost with the server; their hosts are waited for: {_list(names)}",)
    result = SyncResult(max_conn, paused, division, hosts, events, bounded, names, seen.again_s)
    silent = [x for x in others if x.instance in seen.silent and presence.sessions_of(x)]
    return SyncDecision(
        result,
        division.asked,
        tuple(seen.gone),
        seen.lowered,
        presence.unnamed(me, backends),
        tuple(silent) if division.lacking else (),
        tuple(x.instance for x in others) if is_changed else division.to_wake,
        tuple(sorted({me, *missing, *(x.instance for x in others if _is_name(x.instance))})),
        bool(missing),
    )


def look_every_s(result: SyncResult | None) -> float:
    """Return how old the server's list may be at the next sync, by the outcome of the last one.

    The list shows that a host is gone. While somebody waits for its slots, a host that has less
    than is fair looks often, and the others in turns, so that many hosts do not burden the server.
    """
    if result is None:
        return OLD_S
    division, turn_s = result.division, _TOGETHER_S * (1 + len(result.others))
    if division.alone:
        return math.inf
    if division.lacking:
        return _LACKING_S
    return min(max(_LACKING_S, turn_s), OLD_S) if division.contended else OLD_S


def _share(row: Listed, *, silent: bool) -> HostShare:
    """Return a host's part in the division; one that is silent wants nothing."""
    return HostShare(row.instance, row.held, 0 if silent else row.wanted, row.answered)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" * (len(names) > _NAMED))


def _is_name(instance: str) -> bool:
    """Return True unless somebody else has written a row."""
    return instance.isprintable() and " " not in instance


def _shown(name: str) -> str:
    """Return a name of a row as it may be shown in a terminal."""
    return name if name.isprintable() else ascii(name)


def _missing(me: str, limit: LimitRow, rows: Sequence[Listed]) -> list[str]:
    """Return the hosts whose shares were lost, and that may be about to come back.

    The table of the shares is emptied by a crash of the server, the list of the hosts is not.
    """
    if limit.lost_s is not None and limit.lost_s >= BACK_S:
        return []
    return sorted(set(limit.hosts) - {row.instance for row in rows} - {me})


def _is_bounded(me: str, order: SyncShare, rows: Sequence[Listed], missing: Sequence[str]) -> bool:
    """Return True if this host may take no more than it had: the table may have been emptied."""
    present = {_shown(row.instance) for row in rows}
    if order.sure and _shown(me) in present:
        return False
    return bool(missing) or not present.issuperset(order.missed)

"""Measure the division of one limit among many hosts: `python -m tests.bench.shares [HOSTS]`.

Prints milliseconds of CPU for `decide` and for a whole `decide_sync`, which every sync runs while
it holds the limit's lock. All hosts want more than is fair: no case costs more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from sharedpool.broker.core.commands import SyncShare
from sharedpool.broker.core.host_presence import SESSION_NAME, Listed, Presence
from sharedpool.broker.core.share_sync import decide_sync
from sharedpool.broker.core.share_terms import LimitRow, ShareKey
from sharedpool.broker.core.shares import Claim, HostShare, decide

_ROUNDS = 50


def main(hosts: int) -> None:
    """Measure with so many hosts."""
    limit = 4 * hosts
    names = [f"{number:08x}" for number in range(hosts)]
    others = {name: HostShare(name, 4, 5 + number % 7) for number, name in enumerate(names[1:])}
    claim = Claim(9, 4)
    rows = [
        Listed(name, "host", number, number, 4, 5 + number % 7, 0, False, 0.0)
        for number, name in enumerate(names)
    ]
    sessions = [(number, number, SESSION_NAME + name) for number, name in enumerate(names)]
    sessions += [(limit + n, 1, f"sharedpool p [{name}]") for n, name in enumerate(4 * names)]
    presence = Presence()
    presence.seen(frozenset(), sessions, 0.0)
    order = SyncShare(ShareKey("", "pool p"), limit, claim, 0)
    measured: dict[str, Callable[[], object]] = {
        "decide": lambda: decide(limit, names[0], 4, claim, others),
        "decide_sync": lambda: decide_sync(names[0], order, LimitRow(limit), rows, presence),
    }
    for what, function in measured.items():
        times = sorted(_timed(function) for _ in range(_ROUNDS))
        print(
            f"{what}, {hosts} hosts: median {times[_ROUNDS // 2]:.2f} ms,"
            f" 90 % {times[_ROUNDS * 9 // 10]:.2f} ms"
        )


def _timed(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return 1000 * (time.process_time() - began)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)

"""Faults of workers: killed, frozen, forked."""

import random
import signal
import time

import pytest

from tests.faults.brokers import ReportWatch
from tests.faults.environment import MAX_CONN, TTL_S, WORKERS, Environment
from tests.faults.events import Checkout
from tests.faults.results import CONFIRMED_S, Row, percentile, scale, spread
from tests.faults.server_log import Depth
from tests.faults.worker_fleet import WorkerFleet

pytestmark = [pytest.mark.fault, pytest.mark.timeout(scale(120, 600))]


@pytest.mark.row(
    "sigkill", "SIGKILL of a random worker every 0.5 s: idle, in a query, in the middle of "
               "connecting",
    "slot back: p99 ≤ 0.5 s",
)  # fmt: skip
def test_the_slots_of_killed_workers_come_back(field: Environment, row: Row) -> None:
    """Slot back: from the kill until the first report of the broker has come that shows no lease of
    that process.

    A slot that is not counted for anybody is what the next waiter gets in the same turn of the
    broker's loop. Reports are asked for every 10 ms; a kill counts when no report before it showed
    that the process holds nothing any more.
    """
    rng = random.Random(row.seed)
    crew = field.open()
    crew.start(WORKERS)
    kills: list[tuple[int, float, str]] = []
    kinds: dict[str, int] = {}
    started = time.monotonic()
    with ReportWatch(field.address) as watch:
        for step in range(scale(12, 240)):
            # The schedule is the fault: no wait for any condition.
            time.sleep(max(0.0, started + step * scale(0.25, 0.5) - time.monotonic()))
            kind = rng.choice(["at random", "idle", "in a query", "connecting"])
            number = rng.choice(sorted(crew.alive))
            pid = crew.pid(number)
            kills.append((pid, _kill(crew, number, kind, rng), kind))
            kinds[kind] = kinds.get(kind, 0) + 1
            crew.start(1)
        timed = [
            (freed - at, kind)
            for pid, at, kind in kills
            if (freed := watch.freed(pid, at)) is not None
        ]
    back = [after_s for after_s, _ in timed]
    row.faults = len(kills)
    row.figures |= {"kills": kinds, "slot back": spread(back), "slowest": sorted(timed)[-5:]}
    row.worst = percentile(back, 99)
    row.measured = f"{len(kills)} kills; slot back {spread(back, 1e-3, 'ms')}"
    field.judge()
    assert len(back) >= len(kills) // 4, "hardly anybody held anything when it was killed"
    assert max(back) <= scale(3.0, 1.5), f"slots back after {sorted(back)[-5:]} s"
    if scale(False, True):
        assert row.worst <= 0.5


def _kill(crew: WorkerFleet, number: int, kind: str, rng: random.Random) -> float:
    """Kill a worker in the ordered situation; return when."""
    since = time.monotonic()
    order, sign = {"idle": ("i", "idle"), "in a query": ("q", "queries")}.get(kind, ("r", ""))
    if kind == "connecting":
        crew.order([number], "d")
        (dies,) = crew.wait_for([number], "dies", since)
        crew.buried(number, dies.at)
        return dies.at
    crew.order([number], order)
    if sign:
        crew.wait_for([number], sign, since)
        time.sleep(rng.uniform(0, 0.02))  # where in its query it is hit is to be random
    return crew.kill(number)


@pytest.mark.long
@pytest.mark.row(
    "sigstop",
    "SIGSTOP for 3 TTL, then SIGCONT",
    "waiter served ≤ TTL + 0.5 s; stale connections handed out: 0",
)
def test_frozen_workers_lose_their_slots_to_waiters_and_find_out_loudly(
    field: Environment, row: Row
) -> None:
    """Freeze workers that have all slots (half lent out, half idle), while the others wait for one.

    A connection is stale when it is handed out although, by the server's log, its backend had ended
    for a while when the checkout began. One that is ended while it is being handed out (its worker
    has just woken, and the broker has not heard it yet) fails loudly, and is counted as raced.
    """
    crew = field.open(timeouts=[10, 20], discard=0.05)
    crew.start(WORKERS, "p")
    served: list[float] = []
    for _ in range(scale(1, 8)):
        crew.quiet()
        frozen = sorted(crew.alive)[:MAX_CONN]
        others = sorted(crew.alive)[MAX_CONN:]
        begin = time.monotonic()
        crew.order(frozen[::2], "h")
        crew.wait_for(frozen[::2], "holds", begin)
        crew.order(frozen[1::2], "i")
        crew.wait_for(frozen[1::2], "idle", begin)
        stopped = time.monotonic()
        for number in frozen:
            crew.signal(number, signal.SIGSTOP)
        crew.order(others, "r")
        served += [event.at - stopped for event in crew.wait_for(others, "out", stopped)]
        # The schedule is the fault: frozen for three times the TTL.
        time.sleep(max(0.0, stopped + scale(1.5, 3) * TTL_S - time.monotonic()))
        thawed = time.monotonic()
        crew.order(frozen, "r")
        for number in frozen:
            crew.signal(number, signal.SIGCONT)
        crew.wait_for(frozen, "back", thawed)
        time.sleep(
            scale(1.0, 3.0)
        )  # the load goes on for so long: what is stale would be handed out now
        row.faults += len(frozen)
    found = field.judge()
    failed_first = [c for c in found if c.errors and c.errors[0][1] == "first"]
    depth, wall = field.log.depth(field.role), time.time() - time.monotonic()
    after = [_gone_for(c, depth, wall) for c in failed_first]
    stale = [c for c, s in zip(failed_first, after, strict=True) if s is None or s > CONFIRMED_S]
    row.figures |= {
        "served": spread(served),
        "stale": len(stale),
        "first queries failed; backend gone for": after,
    }
    row.worst = max(served)
    row.measured = (
        f"{row.faults} frozen; waiters served {spread(served)}; stale {len(stale)};"
        f" ended while being handed out {len(after) - len(stale)}"
    )
    assert not stale, stale
    assert max(served) <= TTL_S + scale(2.5, 0.5)


def _gone_for(checkout: Checkout, depth: Depth, wall: float) -> float | None:
    """Return for how long a checkout's backend had ended when the checkout began; None when the log
    does not say.

    `wall` is the time since the epoch less CLOCK_MONOTONIC.
    """
    assert checkout.backend is not None
    pid, start = checkout.backend
    ended = depth.ended_at(int(pid), float(start))
    return None if ended is None else checkout.asked + wall - ended

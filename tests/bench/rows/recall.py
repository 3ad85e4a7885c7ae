"""One process lies idle on all slots, another asks."""

import time
from contextlib import ExitStack
from functools import partial
from typing import Any

from tests.bench.contestants import US_OFF, broker
from tests.bench.crew import Crew, Member, crew
from tests.bench.peers import OFF, MakeClient, Shared
from tests.bench.report import P50_MS, P99_MS, US, Metric, Result, Sample
from tests.bench.runner import Bench, Contestant, Measure, Row, take_turns
from tests.bench.stats import percentile

SLOTS = 5
_MOST_MS = Metric("most", "ms")


class Neighbour(Member):
    """One of two processes that want all slots in turn."""

    def __init__(self, make: MakeClient) -> None:
        self._client = make()

    def take(self) -> list[float]:
        """Check all out, one after the other, and in again; return the ms that each
        checkout took."""
        held: list[Any] = []
        waits_ms = []
        for _ in range(SLOTS):
            began = time.perf_counter()
            held.append(self._client.checkout())
            waits_ms.append((time.perf_counter() - began) * 1000)
        for conn in held:
            self._client.checkin(conn)
        return waits_ms

    def close(self) -> None:
        self._client.close()


def _recall(bench: Bench, result: Result) -> None:
    dsn = bench.server.dsn
    turns = bench.scaled(1000, 150) // SLOTS // bench.rounds

    def open(stack: ExitStack, options: tuple[tuple[str, Any], ...] = ()) -> Measure:
        make = Shared(dsn, broker(bench, stack, SLOTS, dsn).address, SLOTS, options=options)
        pair: list[Crew] = [stack.enter_context(crew([partial(Neighbour, make)])) for _ in range(2)]
        pair[0].ask("take")
        pair[1].ask("take")

        def measure() -> Sample:
            waits_ms: list[float] = []
            for _ in range(turns):
                waits_ms += pair[0].ask("take")[0]
                pair.reverse()
            figures = {
                P50_MS: percentile(waits_ms, 50),
                P99_MS: percentile(waits_ms, 99),
                _MOST_MS: max(waits_ms),
            }
            return Sample(figures, waits_ms)

        return measure

    take_turns(
        bench,
        result,
        [Contestant(US, open), Contestant(US_OFF, partial(open, options=OFF))],
    )
    for who, each in result.latencies_ms.items():
        result.notes.append(f"{who}: p99 {percentile(each, 99):.2f} ms of all {len(each)} together")


ROWS = (
    Row(
        "recall",
        f"recall latency: one process idle on all {SLOTS} slots, another asks",
        "p99 ≤ 1 ms by hand-over, ≤ 20 ms by close",
        _recall,
    ),
)

"""Many processes with several threads each fight for very few connections: what the server saw, and
every error."""

import random
import threading
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial

from tests.bench.contestants import broker
from tests.bench.crew import Member, Window, crew, sleep_until, window
from tests.bench.peers import MakeClient, Shared
from tests.bench.report import FAIRNESS, THROUGHPUT, US, Metric, Result, Sample
from tests.bench.runner import Bench, Contestant, Measure, Row, take_turns
from tests.bench.stats import fairness
from tests.support.processes import BackendSampler

PROCESSES = 40
THREADS = 4
SLOTS = 6
_WORK_S = 0.002
_PEAK = Metric("most connections", "", 0)
_ERRORS = Metric("errors", "", 0)


class Fighter(Member):
    """A process whose threads want a connection again and again; an error is told,
    and is no end."""

    def __init__(self, make: MakeClient) -> None:
        self._client = make()

    def run(self, turn: Window) -> tuple[int, list[str]]:
        """Return how many transactions were done in the window, and the errors."""
        done: list[int] = []
        errors: list[str] = []

        def work() -> None:
            count = 0
            sleep_until(turn.start)
            while time.monotonic() < turn.end:
                try:
                    conn = self._client.checkout()
                    with conn.cursor() as cursor:
                        cursor.execute("SELECT pg_sleep(%s)", [random.uniform(0, _WORK_S)])
                    conn.commit()
                    self._client.checkin(conn)
                    count += time.monotonic() >= turn.begin
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {error}")
                time.sleep(random.uniform(0, _WORK_S))
            done.append(count)

        crew = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        return sum(done), errors

    def close(self) -> None:
        self._client.close()


def _storm(bench: Bench, result: Result) -> None:
    dsn = bench.server.dsn
    seen: Counter[str] = Counter()

    def open(stack: ExitStack) -> Measure:
        make = Shared(dsn, broker(bench, stack, SLOTS, dsn).address, SLOTS, threads=True)
        fighters = stack.enter_context(crew([partial(Fighter, make)] * PROCESSES))

        def measure() -> Sample:
            with BackendSampler(dsn, "sharedpool default [%") as sampler:
                turn = window(bench.warm_s, bench.window_s)
                outcomes = fighters.ask("run", turn)
            counts = [done for done, _ in outcomes]
            errors = [error for _, each in outcomes for error in each]
            seen.update(errors)
            figures = {
                _PEAK: float(sampler.peak),
                _ERRORS: float(len(errors)),
                THROUGHPUT: sum(counts) / turn.length_s,
                FAIRNESS: fairness(counts),
            }
            return Sample(figures)

        return measure

    take_turns(bench, result, [Contestant(US, open)])
    result.notes += [f"{count} × {error}" for error, count in seen.most_common(5)]


ROWS = (
    Row(
        "storm",
        f"{PROCESSES} processes × {THREADS} threads on {SLOTS} connections",
        f"never more than {SLOTS} on the server, no error",
        _storm,
    ),
)

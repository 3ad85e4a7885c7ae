"""Take the turns: open a row's contestants, measure each in every round, keep what goes wrong in
its row."""

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bench.peers import Unavailable
from tests.bench.report import Comparison, Result, Sample
from tests.bench.server import BenchServer


@dataclass(frozen=True)
class Bench:
    """What every row has: the server, a directory, and how long to take. Times in seconds.

    `slices_s` are settings of `time_slice` that the contended rows are to try beside the default.
    `new_processes`: measure each turn on processes of its own. Which of them share a processor, and
    with which of the server's, makes a difference of a fifth, for as long as they live.
    """

    server: BenchServer
    directory: Path
    rounds: int
    window_s: float
    warm_s: float
    quick: bool
    slices_s: tuple[float, ...] = ()
    new_processes: bool = False

    def scaled(self, full: int, quick: int) -> int:
        """Return the count for a full or for a quick run."""
        return quick if self.quick else full


Measure = Callable[[], Sample]


@dataclass(frozen=True)
class Contestant:
    """One side of a row.

    `open` starts what it needs on the stack and returns what measures one turn.

    Raises Unavailable where it cannot be had.
    """

    name: str
    open: Callable[[ExitStack], Measure]


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    title: str
    goal: str
    run: Callable[[Bench, Result], None]
    comparisons: tuple[Comparison, ...] = ()


def say(text: str) -> None:
    """Tell of progress."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def opened(contestants: Sequence[Contestant], result: Result) -> Iterator[dict[str, Measure]]:
    """Open all contestants at once; note those that cannot be had."""
    with ExitStack() as stack:
        measures: dict[str, Measure] = {}
        for contestant in contestants:
            try:
                measures[contestant.name] = contestant.open(stack)
            except (Unavailable, ImportError) as error:
                result.unmeasured[contestant.name] = str(error)
                say(f"{result.name}: {contestant.name} not measured: {error}")
        yield measures


def take_turns(bench: Bench, result: Result, contestants: Sequence[Contestant]) -> None:
    """Measure all contestants in every round: A B C, A B C, ..."""
    with opened(contestants, result) as measures:
        for number in range(1, bench.rounds + 1):
            words = []
            for name, measure in measures.items():
                sample = measure()
                result.add(name, sample)
                metric, value = next(iter(sample.figures.items()))
                words.append(f"{name} {metric.show(value)} {metric.unit}".rstrip())
            say(f"{result.name} {number}/{bench.rounds}: {'; '.join(words)}")


def run_row(bench: Bench, row: Row) -> Result:
    """Measure one row. What it raises is kept in its result."""
    result = Result(row.name, row.title, row.goal, row.comparisons)
    started = time.monotonic()
    try:
        row.run(bench, result)
    except Exception as error:
        result.error = traceback.format_exc()
        say(f"{row.name}: FAILED: {error}")
    result.seconds = time.monotonic() - started
    say(f"{row.name}: took {result.seconds:.1f} s")
    return result

"""All faults together, for long: does anything grow?"""

import contextlib
import heapq
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

import psycopg2
import pytest

from tests.faults.environment import TTL_S, WORKERS, Environment
from tests.faults.results import SOAK_S, Row, scale
from tests.faults.worker_fleet import WorkerFleet
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.timeout(scale(120, SOAK_S + 600))]

LENGTH_S = scale(9.0, SOAK_S)
WARM_UP = 1 / 3
VETERANS = 2
MB = 1e6
# How often each fault comes, in proportion.
WEIGHTS = {
    "kill": 30,
    "freeze": 15,
    "terminate": 30,
    "fork": 10,
    "freeze broker": 8,
    "kill broker": 5,
    "restart": 2,
}


class Soak:
    """A random schedule of faults. What must be undone later is put down in `_due`."""

    def __init__(self, field: Environment, crew: WorkerFleet, seed: int) -> None:
        self.field, self.crew = field, crew
        self.veterans = crew.start(VETERANS)
        crew.start(WORKERS - VETERANS)
        self.count: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()
        self._busy: set[int] = set()  # workers that are frozen or fork

    def run(self, until: float, *, spare_broker: bool) -> None:
        """Inject faults until then; undo what is to be undone."""
        kinds = [kind for kind in WEIGHTS if not (spare_broker and kind == "kill broker")]
        ways = {
            "kill": self.kill,
            "freeze": self.freeze,
            "terminate": self.terminate,
            "fork": self.fork,
        }
        ways |= {
            "freeze broker": self.freeze_broker,
            "kill broker": self.kill_broker,
            "restart": self.restart,
        }
        fault_at = time.monotonic()
        while (now := time.monotonic()) < until:
            if now >= fault_at:
                (kind,) = self._rng.choices(kinds, [WEIGHTS[kind] for kind in kinds])
                ways[kind]()
                self.count[kind] += 1
                fault_at = now + self._rng.uniform(0.1, scale(0.5, 1.5))
            self._undo(now)
            time.sleep(0.02)  # the schedule is the fault
        self._undo(float("inf"))

    def _undo(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2]()

    def _later(self, after_s: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._due, (time.monotonic() + after_s, next(self._numbers), what))

    def _victim(self) -> int:
        return self._rng.choice(
            [n for n in self.crew.alive if n not in self.veterans and n not in self._busy]
        )

    def kill(self) -> None:
        self.crew.kill(self._victim())
        self.crew.start(1)

    def freeze(self) -> None:
        if len(self._busy) > WORKERS // 3:
            return
        number = self._victim()
        self._busy.add(number)
        self.crew.signal(number, signal.SIGSTOP)

        def thaw() -> None:
            self.crew.signal(number, signal.SIGCONT)
            self._busy.discard(number)

        self._later(self._rng.uniform(0, 2 * TTL_S), thaw)

    def fork(self) -> None:
        if len(self._busy) > WORKERS // 3:
            return
        number = self._victim()
        self._busy.add(number)
        self.crew.order([number], "f")

        def back_to_work() -> None:
            self.crew.order([number], "r")
            self._busy.discard(number)

        self._later(0.3, back_to_work)

    def terminate(self) -> None:
        with contextlib.suppress(psycopg2.OperationalError), self.field.admin() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE usename = %s AND state = 'idle' ORDER BY random() LIMIT 1",
                [self.field.role],
            )

    def freeze_broker(self) -> None:
        broker = self.field.broker
        pid = broker.pid

        def thaw() -> None:
            if broker.pid == pid:
                broker.signal(signal.SIGCONT)

        broker.signal(signal.SIGSTOP)
        self._later(self._rng.uniform(0, 1.5), thaw)

    def kill_broker(self) -> None:
        self.field.broker.kill()
        self.field.broker.launch()

    def restart(self) -> None:
        if self._rng.random() < 0.3:
            self.field.server.kill()
        self.field.server.restart("fast" if self._rng.random() < 0.5 else "immediate")

    # --- what may grow

    def _wait_for_sessions(self) -> None:
        """Wait until the broker's sessions are those of the workers that live, no
        more and no less."""
        crew, broker = self.crew, self.field.broker
        try:
            wait_until(
                lambda: (
                    sorted(s.pid for s in broker.report().sessions) == sorted(crew.alive.values())
                ),
                30,
                "the broker's sessions to be the workers that live",
            )
        except AssertionError as error:
            error.add_note(f"workers: {crew.alive}; broker: {broker.report()}")
            raise

    def measure(self) -> dict[str, tuple[int, int]]:
        """Return the descriptors and the RSS of broker and veterans while nobody does or holds
        anything.

        Nobody holds anything, nor does the broker for nobody, once the pool was paused. The
        broker's descriptors are the fewest of some readings: a report's own line is closed a little
        after it.
        """
        crew, broker = self.crew, self.field.broker
        crew.wait_for(crew.alive, "ask")  # a worker that has only just begun has no session yet
        crew.quiet()
        broker.wait_until_it_answers()
        took, _ = self.field.all_slots()
        assert took == self.field.max_conn, f"only {took} slots could be had: {broker.report()}"
        broker.order("pause", "--wait")
        broker.order("resume")
        wait_until(lambda: broker.report().custody == 0, 30, "all sockets to be gone")
        self._wait_for_sessions()
        wait_until(
            lambda: broker.report().control == "connected", 30, "the control connection to be back"
        )
        directory = Path(f"/proc/{broker.pid}")
        readings: list[int] = []
        # At the second heartbeat, two a TTL of who holds nothing, what only a crowd needed is
        # closed.
        until = time.monotonic() + 2.5 * TTL_S / 2
        while time.monotonic() < until:
            readings.append(len(os.listdir(directory / "fd")))
            time.sleep(0.02)  # some readings, all over that time
        resident = int((directory / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found = {"broker": (min(readings), resident)}
        since = time.monotonic()
        crew.order(self.veterans, "s")
        for number, state in zip(
            self.veterans, crew.wait_for(self.veterans, "state", since), strict=True
        ):
            assert state.words[2] == "0", (
                f"worker {number} still has {state.words[2]} idle connections"
            )
            found[f"worker {number}"] = (int(state.words[0]), int(state.words[1]))
        crew.wait_until_done(self.veterans)
        return found


@pytest.mark.row(
    "soak", "mixed soak 30 min", "file descriptors +0, RSS +2 MB at most, after warm-up"
)
# The role's limit could only hide an overshoot, and the soak is long: without it alone.
@pytest.mark.long
@pytest.mark.parametrize("variant", [""], indirect=True, ids=["counted"])
def test_nothing_grows_under_all_faults_together(field: Environment, row: Row) -> None:
    """Growth: from the end of the warm-up (a third of the time) to the end, of the broker and of
    two workers that are spared. In the warm-up the broker is killed too; then it must live, or
    nothing could grow in it.
    """
    crew = field.open(think=scale(0.1, 0.3))
    soak = Soak(field, crew, row.seed)
    began = time.monotonic()
    soak.run(began + LENGTH_S * WARM_UP, spare_broker=False)
    before = soak.measure()
    crew.order(crew.alive, "r")
    soak.run(began + LENGTH_S, spare_broker=True)
    after = soak.measure()
    # A line to the desk that only a crowd needed is closed at the second look for such, 5 s apart.
    looked = time.monotonic() + 12
    while (
        any(after[who][0] > fds for who, (fds, _) in before.items()) and time.monotonic() < looked
    ):
        after = soak.measure()
    field.judge()
    row.faults = soak.count.total()
    grown = {
        who: (after[who][0] - fds, (after[who][1] - rss) / MB) for who, (fds, rss) in before.items()
    }
    fds, rss = (max(growth[i] for growth in grown.values()) for i in (0, 1))
    row.figures |= {"faults": dict(soak.count), "before": before, "after": after}
    row.worst = rss
    row.measured = (
        f"{LENGTH_S / 60:.3g} min, {row.faults} faults, {row.checkouts} checkouts;"
        f" descriptors {fds:+d}, RSS {rss:+.2f} MB "
        f"({', '.join(f'{who} {r:+.2f}' for who, (_, r) in grown.items())})"
    )
    assert fds <= 0, grown
    assert rss <= scale(8.0, 2.0), grown

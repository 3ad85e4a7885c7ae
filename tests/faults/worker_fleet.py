"""The workers of a fault test: start, order about, kill and replace the processes that
`fault_worker.py` is."""

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sharedpool.descriptors.readable import readable
from tests.faults.events import Event, Tail
from tests.support.waiting import wait_until

_HAMMER = Path(__file__).with_name("fault_worker.py")
_MOST_WORKERS = 8192
ANSWER_S = 60.0


class WorkerFleet:
    """All workers of one test.

    A worker's number names its byte in the orders file and its file of events.
    """

    def __init__(self, directory: Path, seed: int, config: dict[str, Any], **habits: Any) -> None:
        self.directory = directory
        self.config = config
        directory.mkdir()
        (directory / "orders").write_bytes(b"r" * _MOST_WORKERS)
        with (directory / "orders").open("r+b") as file:
            self._orders = mmap.mmap(file.fileno(), 0)
        settings = {"directory": str(directory), "seed": seed, "config": config, **habits}
        self._errors = (directory / "stderr").open("ab")
        self._nursery = subprocess.Popen(
            [sys.executable, str(_HAMMER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._read = b""
        self._next = 0
        self.alive: dict[int, int] = {}  # worker number -> pid
        self.killed: dict[int, float] = {}  # worker number -> when
        self._orphans: set[int] = set()  # pids of children whose parents were killed
        self._tails: dict[str, Tail] = {}
        self._line()

    # --- the nursery

    def _line(self) -> str:
        assert self._nursery.stdout is not None
        deadline = time.monotonic() + ANSWER_S
        while b"\n" not in self._read:
            left = max(0.0, deadline - time.monotonic())
            if not readable([self._nursery.stdout], left):
                raise AssertionError(
                    f"the nursery said nothing for {ANSWER_S:g} s: {self.errors()}"
                )
            chunk = os.read(self._nursery.stdout.fileno(), 4096)
            if not chunk:
                raise AssertionError(f"the nursery has ended: {self.errors()}")
            self._read += chunk
        line, self._read = self._read.split(b"\n", 1)
        return line.decode()

    def _ask(self, command: str, argument: int) -> int:
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(f"{command} {argument}\n".encode())
        self._nursery.stdin.flush()
        return int(self._line())

    def errors(self) -> str:
        """What the workers have written to stderr."""
        return (self.directory / "stderr").read_text(errors="replace")

    # --- workers

    def start(self, count: int = 1, order: str = "r") -> list[int]:
        """Start workers; return their numbers."""
        numbers = list(range(self._next, self._next + count))
        self._next += count
        for number in numbers:
            self.order([number], order)
            self.alive[number] = self._ask("fork", number)
        return numbers

    def order(self, numbers: Iterable[int], order: str) -> None:
        for number in numbers:
            self._orders[number] = ord(order)

    def wait_until_done(self, numbers: Iterable[int], timeout_s: float = 30) -> None:
        """Wait until workers have carried out an order that they follow once, and pause."""
        for number in numbers:
            wait_until(
                lambda n=number: self._orders[n] == ord("p"),
                timeout_s,
                f"worker {number} to be done",
            )

    def pid(self, number: int) -> int:
        return self.alive[number]

    def signal(self, number: int, signum: int) -> None:
        os.kill(self.alive[number], signum)

    def kill(self, number: int) -> float:
        """Kill a worker by SIGKILL and reap it; return when."""
        at = time.monotonic()
        self.signal(number, signal.SIGKILL)
        self.buried(number, at)
        return at

    def buried(self, number: int, at: float) -> None:
        """Reap a worker that was killed, or kills itself."""
        self.killed[number] = at
        self._ask("reap", self.alive.pop(number))

    def adopt(self, pid: int) -> None:
        """Know of a worker's child that outlives it: the nursery is its parent then."""
        self._orphans.add(pid)

    def bid_farewell(self, number: int, pid: int) -> int:
        """Have the child of a killed worker leave, and reap it; return its exit status."""
        self.order([number], "x")
        status = self._ask("reap", pid)
        self._orphans.discard(pid)
        return status

    def quiet(self, timeout_s: float = 45) -> None:
        """Have all workers do nothing."""
        self.order(self.alive, "p")
        for number in self.alive:

            def pauses(number: int = number) -> bool:
                last = self.last(number)
                return last is not None and last.kind == "paused"

            wait_until(
                pauses, timeout_s, f"worker {number} to pause; its last: {self.events(number)[-5:]}"
            )

    def dismiss(self, numbers: Iterable[int] | None = None, within_s: float = 20) -> None:
        """Have workers leave in good order.

        Whoever does not in time is killed, and fails the test.
        """
        leaving = list(self.alive if numbers is None else numbers)
        self.order(leaving, "x")
        for number in leaving:
            with contextlib.suppress(ProcessLookupError):
                self.signal(number, signal.SIGCONT)
        deadline = time.monotonic() + within_s
        late = []
        for number in leaving:
            if not self._leaves_by(number, deadline):
                late.append(self.events(number)[-3:])
                self.signal(number, signal.SIGKILL)
            status = self._ask("reap", self.alive.pop(number))
            assert status == 0 or late, (
                f"worker {number} ended with status {status}: {self.errors()}"
            )
        assert not late, f"workers did not leave within {within_s:g} s: {late}"

    def _leaves_by(self, number: int, deadline: float) -> bool:
        path = Path(f"/proc/{self.alive[number]}/stat")
        while path.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)  # polls for the condition
        return True

    # --- what they tell

    def events(self, name: int | str) -> list[Event]:
        """Return the newest events of a worker (its number), or of a child of one
        (`number-pid`)."""
        return self._tail(name).read()

    def tally(self, name: int | str, kind: str) -> int:
        """Return how many events of a kind a worker has noted."""
        self._tail(name).read()
        return self._tail(name).tally[kind]

    def _tail(self, name: int | str) -> Tail:
        key = str(name)
        if key not in self._tails:
            self._tails[key] = Tail(self.directory / f"{key}.events")
        return self._tails[key]

    def last(self, number: int) -> Event | None:
        events = self.events(number)
        return events[-1] if events else None

    def wait_for(
        self, names: Iterable[int | str], kind: str, since: float = 0.0, timeout_s: float = 30
    ) -> list[Event]:
        """Wait until each of the workers has noted an event of this kind after `since`; return
        these."""
        found = []
        for name in names:

            def happened(name: int | str = name) -> Event | None:
                return next(
                    (e for e in self.events(name) if e.kind == kind and e.at >= since), None
                )

            found.append(wait_until(happened, timeout_s, f"worker {name} to note {kind!r}"))
        return found

    def close(self) -> None:
        """End whatever is left."""
        for pid in (*self.alive.values(), *self._orphans):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.close()
        self._nursery.wait(10)
        self._nursery.stdout.close()
        self._errors.close()
        self._orders.close()

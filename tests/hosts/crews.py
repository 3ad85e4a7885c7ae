"""The workers of all hosts.

Start, order about and dismiss the processes of `host_worker.py`; read what they note.
"""

import json
import mmap
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from tests.faults.events import Checkout, Event, Tail, checkouts, files
from tests.hosts.host import Host, Program
from tests.support.waiting import wait_until

_WORKER = Path(__file__).with_name("host_worker.py")
_MOST_WORKERS = 4096


class Crew:
    """Workers that were started together on one host, by one program."""

    def __init__(self, crews: "Crews", host: Host, numbers: list[int], program: Program) -> None:
        self._crews = crews
        self.host = host
        self.numbers = numbers
        self._program = program

    def order(self, order: str) -> None:
        self._crews.order(self.numbers, order)

    def wait_for(self, kind: str, since: float = 0.0, timeout_s: float = 30) -> list[Event]:
        return self._crews.wait_for(self.numbers, kind, since, timeout_s)

    def dismiss(self, within_s: float = 40) -> None:
        """Have the workers leave, as programs do; none of them may have failed."""
        self.order("x")
        status = self.host.wait(self._program, within_s)
        self._program.close()
        assert status == 0, f"a worker on {self.host.name} failed: {self.host.errors()}"
        self._crews.forget(self)


class Crews:
    """All workers of a test. A worker's number names its byte in the orders and its events file."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        directory.mkdir()
        (directory / "orders").write_bytes(b"p" * _MOST_WORKERS)
        with (directory / "orders").open("r+b") as file:
            self._orders = mmap.mmap(file.fileno(), 0)
        self.config: dict[str, Any] = {}  # how workers that are started from now on make their pool
        self.habits: dict[str, Any] = {"work_s": 0.02, "think_s": 0.01, "timeouts": [1, 3, 10]}
        self.habits |= {"directory": str(directory), "seed": seed, "all_within_s": 10}
        self._next = count()
        self._crews: list[Crew] = []
        self._tails: dict[int, Tail] = {}
        self.killed: dict[str, float] = {}  # worker -> when

    def start(self, host: Host, workers: int, order: str = "r") -> Crew:
        """Start workers on a host."""
        numbers = [next(self._next) for _ in range(workers)]
        self.order(numbers, order)
        settings = self.habits | {"config": self.config, "numbers": numbers}
        program = host.run(sys.executable, str(_WORKER), json.dumps(settings))
        crew = Crew(self, host, numbers, program)
        self._crews.append(crew)
        return crew

    def order(self, numbers: Iterable[int], order: str) -> None:
        for number in numbers:
            self._orders[number] = ord(order)

    def wait_until_done(self, number: int, timeout_s: float = 90) -> None:
        """Wait until a worker has carried out an order that it follows once, and pauses."""
        pause = ord("p")
        what = f"worker {number} to be done; its last: {self.events(number)[-5:]}"
        wait_until(lambda: self._orders[number] == pause, timeout_s, what)

    def forget(self, crew: Crew) -> None:
        self._crews.remove(crew)

    def mourn(self, host: Host, at: float) -> None:
        """Know that a host, with all workers on it, was killed."""
        for crew in [crew for crew in self._crews if crew.host is host]:
            self.killed |= {str(number): at for number in crew.numbers}
            self.forget(crew)

    def quiet(self, timeout_s: float = 60) -> None:
        """Have all workers do nothing."""
        for crew in self._crews:
            crew.order("p")
        for number in (number for crew in self._crews for number in crew.numbers):

            def pauses(number: int = number) -> bool:
                events = self.events(number)
                return bool(events) and events[-1].kind == "paused"

            last = self.events(number)[-5:]
            wait_until(pauses, timeout_s, f"worker {number} to pause; its last: {last}")

    def dismiss(self) -> None:
        for crew in self._crews:
            crew.order("x")
        for crew in list(self._crews):
            crew.dismiss()

    # --- what they tell

    def events(self, number: int) -> list[Event]:
        """Return the newest events of a worker."""
        if number not in self._tails:
            self._tails[number] = Tail(self.directory / f"{number}.events")
        return self._tails[number].read()

    def wait_for(
        self, numbers: Iterable[int], kind: str, since: float = 0.0, timeout_s: float = 30
    ) -> list[Event]:
        """Wait until each worker has noted an event of this kind after `since`; return these."""
        found = []
        for number in numbers:

            def happened(number: int = number) -> Event | None:
                events = self.events(number)
                return next((e for e in events if e.kind == kind and e.at >= since), None)

            last = self.events(number)[-5:]
            what = f"worker {number} to note {kind!r}; its last: {last}"
            found.append(wait_until(happened, timeout_s, what))
        return found

    def checkouts(self) -> list[Checkout]:
        return checkouts(self._all())

    def _all(self) -> dict[str, Iterator[Event]]:
        return files(self.directory)

    def close(self) -> None:
        self._orders.close()

"""A broker as a process of its own, to be killed, frozen and restarted; and a watch
on its state."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from sharedpool.cli.client import fetch_report
from sharedpool.errors import BrokerUnavailable
from sharedpool.wire.reports import Report
from tests.support.waiting import wait_until

START_S = 30.0
_SEEN_S = 0.2


class BrokerProcess:
    """`sharedpool broker` on one address. Its words go to `log`."""

    def __init__(self, address: str, log: Path, **options: object) -> None:
        self.address = address
        self.log = log
        self.command = [sys.executable, "-m", "sharedpool", "broker", "--bind", address]
        for name, value in options.items():
            self.command += [f"--{name.replace('_', '-')}", str(value)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        """Start the process; do not wait for its first word."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start(self) -> "BrokerProcess":
        """Start the process and wait until it answers."""
        self.launch()
        self.wait_until_it_answers()
        return self

    def wait_until_it_answers(self) -> Report:
        def answer() -> Report | None:
            assert self._process is not None
            assert self._process.poll() is None, f"the broker has ended: {self.words()[-2000:]}"
            with contextlib.suppress(BrokerUnavailable):
                return fetch_report(self.address, 0.2)
            return None

        return wait_until(answer, START_S, f"an answer of the broker: {self.words()[-2000:]}")

    def report(self) -> Report:
        return fetch_report(self.address, 10.0)

    def order(self, *words: str) -> None:
        """Give an operator's order."""
        command = [sys.executable, "-m", "sharedpool", *words, "--broker", self.address]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> float:
        """Kill it by SIGKILL, wait for its end, return when it was killed."""
        assert self._process is not None
        at = time.monotonic()
        self._process.kill()
        self._process.wait()
        return at

    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                raise AssertionError(
                    f"the broker did not end when it was told to: {self.words()[-2000:]}"
                ) from None


@dataclass(slots=True)
class Span:
    """A process was seen to hold leases: in no report before `first`, and in none
    from `free` on."""

    first: float
    free: float | None = None


class ReportWatch:
    """Ask the broker for its report every few milliseconds, and remember when each worker process
    held leases."""

    def __init__(self, address: str, every_s: float = 0.01) -> None:
        self._address = address
        self._every_s = every_s
        self._stop_asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="report watch")
        self._lock = threading.Lock()
        self._asked = 0.0
        self._spans: dict[int, list[Span]] = {}  # by pid, which may be used again

    def _run(self) -> None:
        holding: dict[int, Span] = {}
        while not self._stop_asked.wait(self._every_s):
            asked = time.monotonic()
            try:
                report = fetch_report(self._address, 0.5)
            except BrokerUnavailable:
                continue
            came = time.monotonic()
            seen = {session.pid for session in report.sessions if session.leases}
            with self._lock:
                self._asked = asked
                for pid in holding.keys() - seen:
                    holding.pop(pid).free = came
                for pid in seen - holding.keys():
                    holding[pid] = Span(asked)
                    self._spans.setdefault(pid, []).append(holding[pid])

    def held(self, pid: int, at: float = float("inf")) -> Span | None:
        """Return the time in which the process with this pid held leases, if it did at `at` (by
        default: now).

        What it was granted just before may be seen a little later.
        """
        with self._lock:
            spans = self._spans.get(pid, [])
            return next(
                (s for s in spans if s.first <= at + _SEEN_S and (s.free is None or s.free > at)),
                None,
            )

    def freed(self, pid: int, at: float) -> float | None:
        """Wait until a process that was killed at `at` holds nothing any more; return when the
        report came that told.

        None if it held nothing when it was killed. An upper bound: the report's own way is in it.
        """
        wait_until(lambda: self._asked > at, 20, "a report after the kill")
        span = self.held(pid, at)
        if span is None:
            return None
        return wait_until(
            lambda: span.free, 20, f"the leases of the killed process {pid} to be free"
        )

    def __enter__(self) -> "ReportWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self._thread.join()

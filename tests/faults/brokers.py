"""A broker as a process of its own, to be killed, frozen and restarted; and a watch on its state."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from waiting import wait_until

from sharedpool.cli.status import fetch_report
from sharedpool.errors import BrokerUnavailable
from sharedpool.wire.messages import Report

START_S = 30.0


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
            self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

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
                raise AssertionError(f"the broker did not end when it was told to: {self.words()[-2000:]}") from None


class ReportWatch:
    """Ask the broker for its report every few milliseconds, and remember when each worker process held leases."""

    def __init__(self, address: str, every_s: float = 0.01) -> None:
        self._address = address
        self._every_s = every_s
        self._stop_asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="report watch")
        self.lock = threading.Lock()
        self.asked: list[float] = []  # when each report was asked for
        self.held: dict[int, list[list[float]]] = {}  # pid -> spans in which it was seen to hold: first, last

    def _run(self) -> None:
        holding: set[int] = set()
        while not self._stop_asked.wait(self._every_s):
            asked = time.monotonic()
            try:
                report = fetch_report(self._address, 0.5)
            except BrokerUnavailable:
                continue
            came = time.monotonic()
            with self.lock:
                self.asked.append(asked)
                before, holding = holding, {session.pid for session in report.sessions if session.leases}
                for pid in holding:
                    if pid in before:
                        self.held[pid][-1][1] = came
                    else:  # a span of its own: pids are used again
                        self.held.setdefault(pid, []).append([asked, came])

    def last_held(self, pid: int, at: float = float("inf")) -> float | None:
        """Return when the last report came by which the process that had this pid at that time held a lease."""
        with self.lock:
            return max((last for first, last in self.held.get(pid, []) if first <= at), default=None)

    def newest(self) -> float:
        """Return when the newest report was asked for."""
        with self.lock:
            return self.asked[-1] if self.asked else 0.0

    def __enter__(self) -> "ReportWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_asked.set()
        self._thread.join()

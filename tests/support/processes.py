"""Drive worker processes (`worker.py`), and watch the server while they work."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from types import TracebackType
from typing import Any, Self

import psycopg2
import pytest

from sharedpool.descriptors.readable import readable
from tests.support.fork_server import ForkedProgram

# Read before the tests hide the environment from themselves: `tox -e long`.
LONG = os.environ.get("SHAREDPOOL_FAULTS") == "long"


def run_python(
    code: str, *arguments: str, timeout_s: float = 60, **environment: str
) -> "CompletedProcess[str]":
    """Run code in a new Python process and wait for its end; `environment` is added to this
    process's.

    Raise subprocess.TimeoutExpired.
    """
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def as_pid_1() -> tuple[str, ...]:
    """Return a prefix that runs a command as PID 1 of a new namespace, as in a container.

    Killing the prefix's process kills the command. Skip the test where namespaces are not allowed.
    """
    if (unshare := shutil.which("unshare")) is None:
        pytest.skip("there is no unshare (util-linux)")
    account = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    prefix = (unshare, *account, "--pid", "--fork", "--mount-proc", "--kill-child")
    tried = subprocess.run(
        [*prefix, "true"], capture_output=True, text=True, timeout=60, check=False
    )
    if tried.returncode:
        pytest.skip(f"no PID namespace may be made here: {tried.stderr.strip()}")
    return prefix


class Piped(subprocess.Popen[str]):
    """A program that a test talks to through stdin and stdout; the end of a `with` block closes
    both.

    If the test has failed, the program is killed, since the block would otherwise wait for its end.
    """

    def __init__(self, *command: str, **more: Any) -> None:
        super().__init__(command, **{"stdin": PIPE, "stdout": PIPE, "text": True, **more})

    def line(self) -> str:
        """Wait for the program's next line; return the line without its newline, or
        "" at the end."""
        assert self.stdout is not None
        return self.stdout.readline().removesuffix("\n")

    def tell(self, line: str) -> None:
        assert self.stdin is not None
        self.stdin.write(f"{line}\n")
        self.stdin.flush()

    def tell_no_more(self) -> None:
        """Close the program's input, which makes most programs end."""
        assert self.stdin is not None
        self.stdin.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, trace)


class Worker:
    """A worker process.

    `ask` sends a command and waits for the answer; `send` and `answer` are its two halves.
    """

    program = Path(__file__).with_name("worker.py")

    def __init__(self, *, prefix: Sequence[str] = (), fresh: bool = False, **settings: Any) -> None:
        """Start the process.

        `prefix` is a command that runs it, and `pid` is then the prefix's. `fresh`: it imports
        everything itself, instead of being a fork of a process that has done so.
        """
        self._read = ""
        text = json.dumps(settings)
        self._process: Piped | ForkedProgram
        if prefix or fresh:
            self._process = Piped(*prefix, sys.executable, str(self.program), text)
        else:
            self._process = ForkedProgram(self.program, text)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> Self:
        assert self._line(60) == "ready"
        return self

    def send(self, do: str, **arguments: Any) -> None:
        self._process.tell(json.dumps({"do": do, **arguments}))

    def answer(self, timeout_s: float = 60) -> Any:
        return json.loads(self._line(timeout_s))

    def ask(self, do: str, **arguments: Any) -> Any:
        self.send(do, **arguments)
        return self.answer()

    def _line(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while "\n" not in self._read:
            if not readable([self._process.stdout], deadline - time.monotonic()):
                raise AssertionError(f"worker {self.pid} said nothing for {timeout_s} s")
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                raise AssertionError(f"worker {self.pid} ended with status {self._process.wait()}")
            self._read += chunk.decode()
        line, self._read = self._read.split("\n", 1)
        return line

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Wait for the process to end; return its exit status."""
        return self._process.wait(timeout_s)

    def end(self) -> int:
        """Close the worker's input, so that it ends in good order; return its exit status."""
        with contextlib.suppress(BrokenPipeError):
            self._process.tell_no_more()
        return self._process.wait(30)

    def __enter__(self) -> Self:
        return self.ready()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            try:
                self.end()
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.tell_no_more()
        self._process.stdout.close()
        self._process.wait()


@contextlib.contextmanager
def workers(count: int, **settings: Any) -> Iterator[list[Worker]]:
    """Start workers at the same time, and end them all."""
    with contextlib.ExitStack() as stack:
        started = [Worker(**settings) for _ in range(count)]
        for worker in started:
            stack.push(worker.__exit__)
        for worker in started:
            worker.ready()
        yield started


class BackendSampler(threading.Thread):
    """Count the backends with an application_name LIKE `pattern`, as fast as the server answers.

    `peak` is the highest count.
    """

    def __init__(self, dsn: str, pattern: str) -> None:
        super().__init__(name="sampler")
        self._conn = psycopg2.connect(dsn, application_name="test sampler")
        self._conn.autocommit = True
        self._pattern = pattern
        self._stop_asked = threading.Event()
        self.peak = 0
        self.samples = 0

    def run(self) -> None:
        with self._conn.cursor() as cursor:
            over = False
            while not over:
                over = self._stop_asked.is_set()  # one look in any case
                cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s",
                    [self._pattern],
                )
                row = cursor.fetchone()
                assert row is not None
                self.peak = max(self.peak, row[0])
                self.samples += 1
                time.sleep(0.001)  # leave the processor to the workers

    def __enter__(self) -> "BackendSampler":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()
        self._conn.close()


def alive(pid: int) -> bool:
    """Return True if a process exists and is not a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # reaped before opening, or before reading
        return False

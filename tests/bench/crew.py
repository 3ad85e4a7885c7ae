"""Forked worker processes that obey in step.

Members answer when they are ready, and each turn names its start by the clock that all processes
share: nobody works before all are ready, and nobody measures before all work.
"""

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

from tests.bench.processes import die_with_parent

_ANSWER_LIMIT_S = 120.0
_END_LIMIT_S = 10.0
# What it takes to tell 64 processes.
_HEAD_START_S = 0.05

_context = get_context("fork")


class CrewError(Exception):
    """A member failed; the text is its traceback."""


class Member(Protocol):
    """What runs in a worker process. Its methods are the orders it obeys."""

    def close(self) -> None:
        """End in good order."""


class Window(NamedTuple):
    """One turn, in seconds of `time.monotonic`: work from `start` to `end`, measure from `begin`
    on."""

    start: float
    begin: float
    end: float

    @property
    def length_s(self) -> float:
        return self.end - self.begin


def window(warm_s: float, window_s: float) -> Window:
    """Return a turn that starts in a moment."""
    start = time.monotonic() + _HEAD_START_S
    return Window(start, start + warm_s, start + warm_s + window_s)


def sleep_until(at: float) -> None:
    """Sleep until `time.monotonic()` says `at`."""
    if (left := at - time.monotonic()) > 0:
        time.sleep(left)


class Crew:
    """Processes forked from this one, which must have no threads.

    `ask` gives all of them the same order.
    """

    def __init__(self, make: Sequence[Callable[[], Member]]) -> None:
        self._pipes: list[Connection] = []
        self._processes = []
        for each in make:
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(theirs, each, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def ready(self) -> "Crew":
        """Wait until all have what they need. Raises CrewError."""
        self.answers()
        return self

    def tell(self, method: str, *arguments: Any) -> None:
        """Give all members an order."""
        for pipe in self._pipes:
            pipe.send((method, arguments))

    def answers(self, limit_s: float = _ANSWER_LIMIT_S) -> list[Any]:
        """Wait for all answers to an order; raises CrewError with what the first that failed has to
        say."""
        deadline = time.monotonic() + limit_s
        found: list[Any] = []
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise CrewError(f"process {process.pid} gave no answer in {limit_s:g} s")
            try:
                good, answer = pipe.recv()
            except EOFError:
                raise CrewError(f"process {process.pid} ended without a word") from None
            if not good:
                raise CrewError(answer)
            found.append(answer)
        return found

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Give all members an order and return their answers. Raises CrewError."""
        self.tell(method, *arguments)
        return self.answers()

    def close(self) -> None:
        """Let all end in good order, or kill them."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + _END_LIMIT_S
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()


@contextlib.contextmanager
def crew(make: Sequence[Callable[[], Member]]) -> Iterator[Crew]:
    """Have a crew that is ready. Raises CrewError."""
    members = Crew(make)
    try:
        yield members.ready()
    finally:
        members.close()


def _serve(pipe: Connection, make: Callable[[], Member], parent: int) -> None:
    """Be a member."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    if os.getppid() != parent:
        return
    member: Member | None = None
    try:
        member = make()
        pipe.send((True, None))
        while (order := pipe.recv()) is not None:
            method, arguments = order
            pipe.send((True, getattr(member, method)(*arguments)))
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send((False, traceback.format_exc()))
    finally:
        if member is not None:
            member.close()

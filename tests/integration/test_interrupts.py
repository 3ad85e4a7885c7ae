"""An exception that is raised in any line of ours loses nothing: no descriptor, no lease, no waiting ticket.

A signal's handler may raise anywhere. Here an exception is raised before the first line that a call executes, then
before the second, and so on until the call comes through.
"""

import dis
import functools
import gc
import linecache
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from waiting import wait_until

import sharedpool
from sharedpool.owned import Identity, identity
from sharedpool.worker.pool import Pool

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",  # raised in a finalizer
    "ignore::ResourceWarning",  # a socket that its owner's end has closed
)

_PACKAGE = str(Path(sharedpool.__file__).parent)
# All of them with SHAREDPOOL_LINES=1; read before the tests hide the environment from themselves.
_EACH = int(os.environ.get("SHAREDPOOL_LINES", "3"))


class Interrupt(BaseException):
    pass


class Interrupted:
    """A call of ours in which an exception is raised before the nth line; `place` is where, "" if it came through."""

    def __init__(self, line: int, call: Callable[[], object], *, again: int = 0) -> None:
        """`again`: raise another so many lines later, in the clean-up of the first."""
        self.place = ""
        self._left, self._again = line, again
        sys.settrace(self._trace)
        try:
            call()
        except Interrupt:
            pass
        finally:
            sys.setprofile(None)
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        if event == "line" and not _leaves_with(frame):
            self._left -= 1
            if self._left < 0:
                place = f"{os.path.relpath(frame.f_code.co_filename, _PACKAGE)}:{frame.f_lineno}"
                self.place += f" and {place}" if self.place else place
                self._left, self._again = self._again or sys.maxsize, 0
                sys.setprofile(self._resume)
                raise Interrupt
        return self._trace

    def _resume(self, frame: FrameType | None, event: str, _: object) -> None:
        """Trace on: the interpreter stops when a trace function raises."""
        sys.setprofile(None)
        while frame is not None:
            if frame.f_code.co_filename.startswith(_PACKAGE):
                frame.f_trace = self._trace
            frame = frame.f_back
        sys.settrace(self._trace)


@functools.cache
def _entry(code: CodeType, line: int) -> int:
    """Return where in the code a line begins, if it is a `with`; -1 if not."""
    is_with = linecache.getline(code.co_filename, line).lstrip().startswith("with ")
    return min(start for start, number in dis.findlinestarts(code) if number == line) if is_with else -1


def _leaves_with(frame: FrameType) -> bool:
    """Say whether a block is left just now: there no signal's handler runs, else no lock would ever be safe."""
    return _entry(frame.f_code, frame.f_lineno) not in (-1, frame.f_lasti)


def open_files() -> dict[int, Identity]:
    return {number: identity(number) for each in os.listdir("/proc/self/fd") if (number := int(each)) > 2}


class Watch:
    """What is open, held and waited for, and whose fault that is."""

    def __init__(self, *pools: Pool) -> None:
        self.pools = pools
        self.guilty: dict[object, str] = {}
        self._foreign: dict[int, tuple[int, Identity]] = {}
        self._before = 0

    def begin(self) -> None:
        self._before = len(open_files())
        self._open()

    def _open(self) -> None:
        """Take the numbers that have become free."""
        for _ in range(8):
            number = os.open(os.devnull, os.O_RDONLY)
            os.close(number)
            reading, writing = os.pipe()
            os.close(writing)
            self._foreign[reading] = (reading, identity(reading))

    def look(self, place: str) -> None:
        for number, known in self._foreign.values():
            assert identity(number) == known, f"a foreign file was closed after an interrupt at {place}"
        for pool in self.pools:
            cache = pool._holdings.cache
            for each in (*cache.leases, *cache.waiting.values(), *pool._holdings.booths._all):
                self.guilty.setdefault(each, place)
        for number, known in open_files().items():
            self.guilty.setdefault((number, known), place)
        if len(self._foreign) > 64:
            self._end()
        self._open()

    def _end(self) -> None:
        for number, known in self._foreign.values():
            assert identity(number) == known
            os.close(number)
        self._foreign.clear()

    def left(self) -> list[str]:
        """Return the places after which something is still held."""
        found: list[object] = []
        for pool in self.pools:
            cache = pool._holdings.cache
            idle = set(cache.idle)
            found += [token for token, lease in list(cache.leases.items()) if lease not in idle]
            found += list(cache.waiting.values())
        return [f"{each}: {self.guilty.get(each, '?')}" for each in found]

    def finish(self, release: Callable[[], object]) -> None:
        self._end()
        gc.collect()
        wait_until(lambda: not self.left() or gc.collect(), 30, f"what is lost to come back: {self.left()}")
        release()
        for pool in self.pools:
            pool.release_all()
        wait_until(lambda: all(t.name != "sharedpool-link" for t in threading.enumerate()), what="the links to end")
        gc.collect()
        wait_until(lambda: len(open_files()) <= self._before, 10, "descriptors to be closed")


def test_x() -> None:
    pass

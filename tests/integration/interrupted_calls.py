"""A call in which an exception is raised, and what it has left open, held and waited for."""

import dis
import functools
import gc
import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import sharedpool
from sharedpool.descriptors.owned import NOTHING, Identity, identity
from sharedpool.worker.connection import closing
from sharedpool.worker.pool import Pool

_PACKAGE = str(Path(sharedpool.__file__).parent)


class Interrupt(BaseException):
    pass


class Interrupted:
    """A call of ours in which an exception is raised before the nth line; `place` is where, "" if
    it came through."""

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
        if event == "line" and not (_leaves_with(frame) or _leaves_except(frame)):
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
    return (
        min(start for start, number in dis.findlinestarts(code) if number == line)
        if is_with
        else -1
    )


def _leaves_with(frame: FrameType) -> bool:
    """Return True while a `with` block is being left: there Python runs no signal handler."""
    return _entry(frame.f_code, frame.f_lineno) not in (-1, frame.f_lasti)


def _leaves_except(frame: FrameType) -> bool:
    """Say whether a handler is left just now: no signal's runs there, and CPython would keep the
    exception for ever."""
    return frame.f_code.co_code[frame.f_lasti] == dis.opmap["POP_EXCEPT"]


def open_files() -> dict[int, Identity]:
    found = {
        number: identity(number)
        for each in os.listdir("/proc/self/fd")
        if (number := int(each)) > 2
    }
    return {
        number: known for number, known in found.items() if known != NOTHING
    }  # without the folder itself


class Watch:
    """What is open, held and waited for, and after which interrupt it came to be so."""

    def __init__(self) -> None:
        self.pools: tuple[Pool, ...] = ()
        self._guilty: dict[object, str] = {}
        self._foreign: dict[int, Identity] = {}
        self._before = open_files()

    def look(self, place: str) -> None:
        """Look at everything after an interrupt at `place`; take the numbers that
        have become free."""
        self.close_foreign(place)
        for pool in self.pools:
            # By their numbers: a waiter that is referred to here would not be seen to be abandoned.
            for each in (*pool._local.cache.leases, *pool._local.cache.waiting):
                self._guilty.setdefault((pool, each), place)
        for each in open_files().items():
            self._guilty.setdefault(each, place)
        for _ in range(10):
            reading, writing = os.pipe()
            os.close(writing)
            self._foreign[reading] = identity(reading)

    def close_foreign(self, place: str = "the end") -> None:
        for number, known in self._foreign.items():
            assert identity(number) == known, (
                f"a foreign file was closed after an interrupt at {place}"
            )
            os.close(number)
        self._foreign.clear()

    def lost(self) -> list[str]:
        """Return the places after which something is still held, or waited for, by nobody."""
        found: list[object] = []
        for pool in self.pools:
            cache = pool._local.cache
            held = [
                lease.token for lease in list(cache.leases.values()) if lease not in set(cache.idle)
            ]
            found += [(pool, each) for each in (*held, *cache.waiting)]
            found += (
                ["dropped connections are being reclaimed"]
                if pool._local.reclaim_lock.locked
                else []
            )
            found += [
                (pool, token)
                for token, (_, held) in list(cache.arriving.items())
                if held() is not None
            ]
            if (wait_sockets := pool._local.membership.wait_sockets) is not None:
                found += [
                    wait_socket
                    for wait_socket in wait_sockets._all
                    if wait_socket not in wait_sockets._free
                ]
        gc.collect()
        return [f"{each}: {self._guilty.get(each, '?')}" for each in found]

    def still_open(self) -> list[str]:
        """Return the descriptors that are open, were not at the start, and after which places each
        came to be."""
        gc.collect()
        # One is made once and kept: on which nothing can be sent.
        found = {
            each
            for each in open_files().items()
            if each not in self._before.items() and each != closing._dead_socket
        }
        return [f"{number}: {self._guilty.get((number, known), '?')}" for number, known in found]

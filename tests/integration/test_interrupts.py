"""An exception that is raised in any line of ours loses nothing: no descriptor, no lease, no
waiting thread.

A signal's handler may raise anywhere. Here an exception is raised before the first line that a call
executes, then before the second, and so on until the call comes through: before every one with
SHAREDPOOL_LINES=1, else before every so manyth, from one on that SHAREDPOOL_LINES_SEED chooses: the
same in each run, in a long one another.
"""

import contextlib
import dataclasses
import dis
import functools
import gc
import linecache
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import sharedpool
from sharedpool.descriptors.owned import NOTHING, Identity, identity
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection import closing
from sharedpool.worker.pool import Pool
from tests.support.processes import LONG
from tests.support.waiting import wait_until

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",  # raised in a finalizer
    "ignore::ResourceWarning",  # a socket that its owner's end has closed
)

_PACKAGE = str(Path(sharedpool.__file__).parent)
# Read before the tests hide the environment from themselves.
_STEP = int(os.environ.get("SHAREDPOOL_LINES", "53" if LONG else "211"))
_SEED = int(
    os.environ.get("SHAREDPOOL_LINES_SEED")
    or (random.SystemRandom().randrange(1 << 32) if LONG else 1)
)


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


Way = Callable[[Pool, Pool], Callable[[], object]]


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


def hit(a: Pool, b: Pool) -> Callable[[], object]:
    a.put_conn(a.get_conn(timeout=30))
    return lambda: a.put_conn(a.get_conn(timeout=30))


def opened(a: Pool, b: Pool) -> Callable[[], object]:
    a.close_idle()
    b.close_idle()
    return lambda: a.put_conn(a.get_conn(timeout=30), close=True)


def rolled_back(a: Pool, b: Pool) -> Callable[[], object]:
    def use() -> None:
        conn = a.get_conn(timeout=30)
        conn.cursor().execute("SELECT 1")
        a.put_conn(conn)

    return use


def adopted(a: Pool, b: Pool) -> Callable[[], object]:
    a.close_idle()
    held = []
    with contextlib.suppress(sharedpool.PoolError):
        while True:
            held.append(b.get_conn(timeout=0))
    while held:
        b.put_conn(held.pop())  # all that can be had lies idle there
    return lambda: a.put_conn(a.get_conn(timeout=30))


def given(a: Pool, b: Pool) -> Callable[[], object]:
    b.close_idle()
    conn = a.get_conn(timeout=30)
    if b.stats().waiting == 0:

        def wait() -> None:
            with contextlib.suppress(sharedpool.PoolError):
                b.put_conn(b.get_conn(timeout=0.3))

        threading.Thread(target=wait).start()

    def give() -> None:
        nonlocal conn
        got, conn = conn, None  # type: ignore[assignment]
        a.put_conn(got)

    return give


# --- in the lane, in which connections move past the broker


def let_move(*pools: Pool) -> None:
    """Have these sessions of a pool share its one connection until it moves past the broker."""
    gc.collect()  # what an interrupt has left in a cycle is not seen to be lost before
    caches, moving = [pool._local.cache for pool in pools], threading.Event()

    def share(pool: Pool) -> None:
        while not moving.is_set():
            if all(cache.moving_flag[0] for cache in caches):
                moving.set()
            pool.put_conn(pool.get_conn(timeout=30))

    threads = [threading.Thread(target=share, args=(pool,)) for pool in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def waits(pool: Pool) -> bool:
    """Say whether somebody waits in this session: in the lane, or at the broker, if connections
    move no more."""
    sockets = pool._local.membership.wait_sockets
    return bool(pool._local.cache.waiting) or (
        sockets is not None and sockets.lane.board.waiting(range(8)) > 0
    )


def _waited(a: Pool, b: Pool, key: str | None) -> Callable[[], object]:
    let_move(a, b)
    conn = b.get_conn(timeout=30)
    over = threading.Event()

    def give() -> None:
        while not (waits(a) or over.wait(0.001)):
            pass
        b.put_conn(conn)

    giver = threading.Thread(target=give)
    giver.start()

    def wait() -> None:
        try:
            a.put_conn(a.get_conn(key, timeout=30), key)
        finally:
            over.set()
            giver.join()

    return wait


def waited_in_lane(a: Pool, b: Pool) -> Callable[[], object]:
    return _waited(a, b, None)


def waited_in_lane_by_the_slow_path(a: Pool, b: Pool) -> Callable[[], object]:
    return _waited(a, b, "key")


def taken_from_shelf(a: Pool, b: Pool) -> Callable[[], object]:
    let_move(a, b)
    b.put_conn(b.get_conn(timeout=30))
    return lambda: a.put_conn(a.get_conn(timeout=30))


def given_in_lane(a: Pool, b: Pool) -> Callable[[], object]:
    let_move(a, b)
    conn = a.get_conn(timeout=30)

    def wait() -> None:
        b.put_conn(b.get_conn(timeout=30))

    threading.Thread(target=wait).start()
    wait_until(lambda: waits(b), what="somebody to wait")

    def give() -> None:
        nonlocal conn
        got, conn = conn, None  # type: ignore[assignment]
        a.put_conn(got)

    return give


IN_LANE = [waited_in_lane, waited_in_lane_by_the_slow_path, taken_from_shelf, given_in_lane]


@pytest.fixture(scope="module")
def quick_broker(
    postgres: EphemeralPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[sharedpool.Broker]:
    """A broker whose workers look four times a second for what was lost."""
    address = f"ipc://{tmp_path_factory.mktemp('broker')}/broker.sock"
    with sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=1.0) as broker:
        yield broker


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(0, id="once"),
        pytest.param(1, id="the clean-up at once", marks=pytest.mark.long),
        pytest.param(3, id="the clean-up a little later", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("way", [hit, opened, rolled_back, adopted, given, *IN_LANE])
def test_an_interrupt_in_any_line_loses_nothing(
    way: Callable[[Pool, Pool], Callable[[], object]],
    again: int,
    quick_broker: sharedpool.Broker,
    postgres: EphemeralPostgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is raised in a finalizer has been seen to: pytest would keep it, and with it what its
    # frames hold.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    # A close that was interrupted is finished sooner than it would be.
    monkeypatch.setattr("sharedpool.worker.core.dropped_leases.CLOSING_LIMIT_S", 0.5)
    most = 1 if way in IN_LANE else 3 if way is given else 20
    eager: dict[str, Any] = {"time_slice": 0} if way in IN_LANE else {}
    watch = Watch()
    others = set(threading.enumerate())
    a = sharedpool.config_pool(
        name=f"{way.__name__}{again}",
        dsn=postgres.dsn,
        broker=quick_broker.address,
        max_conn=most,
        timeout=30,
        pool_manager=sharedpool.ThreadedConnectionPool,
        **eager,
    )
    b = type(a)(dataclasses.replace(a.config), a._broker)
    for pool in (a, b):
        pool.put_conn(pool.get_conn(), close=True)
    watch.pools = a, b
    # The others have few lines.
    step = _STEP if way in (opened, adopted) else min(_STEP, 11 if LONG else 53)
    line = random.Random(f"{_SEED} {way.__name__} {again}").randrange(step)
    print(f"SHAREDPOOL_LINES_SEED={_SEED} does this again")
    while True:
        done = Interrupted(line, way(a, b), again=again)
        watch.look(done.place)
        if not done.place:
            break
        line += step
    assert line > 20
    watch.close_foreign()
    wait_for_none(watch.lost, 20)
    a.close_idle()
    b.close_idle()
    wait_until(lambda: can_have(a, most), 30, "all slots to be had")
    for pool in (a, b):
        pool.release_all()
        pool._local.shells._trim(0)
    wait_until(
        lambda: all(thread in others for thread in threading.enumerate()), what="the link's end"
    )
    wait_for_none(watch.still_open, 5)


def wait_for_none(find: Callable[[], list[str]], timeout_s: float) -> None:
    """Wait until nothing is found; else say what was."""
    found: list[str] = []

    def none() -> bool:
        found[:] = find()
        return not found

    try:
        wait_until(none, timeout_s)
    except AssertionError:
        raise AssertionError(f"{find.__name__}, {timeout_s:g} s later: {found}") from None


def can_have(pool: Pool, count: int) -> bool:
    held = []
    try:
        for _ in range(count):
            held.append(pool.get_conn(timeout=5))
    except sharedpool.PoolTimeout:
        return False
    finally:
        for conn in held:
            pool.put_conn(conn)
    return True

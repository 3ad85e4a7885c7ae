"""An exception that is raised in any line of ours loses nothing: no descriptor, no lease, no
waiting thread.

A signal's handler may raise anywhere. Here an exception is raised before the first line that a call
executes, then before the second, and so on until the call comes through: before every one with
SHAREDPOOL_LINES=1, else before every so manyth, from one on that SHAREDPOOL_LINES_SEED chooses: the
same in each run, in a long one another.
"""

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec import structs

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.pool import Pool
from tests.integration.interrupted_calls import Interrupted, Watch
from tests.integration.interrupted_ways import IN_LANE, adopted, given, hit, opened, rolled_back
from tests.support.processes import LONG
from tests.support.waiting import wait_until

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",  # raised in a finalizer
    "ignore::ResourceWarning",  # a socket that its owner's end has closed
)

# Read before the tests hide the environment from themselves.
_STEP = int(os.environ.get("SHAREDPOOL_LINES", "53" if LONG else "211"))
_SEED = int(
    os.environ.get("SHAREDPOOL_LINES_SEED")
    or (random.SystemRandom().randrange(1 << 32) if LONG else 1)
)


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
    b = type(a)(structs.replace(a.config), a._broker)
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

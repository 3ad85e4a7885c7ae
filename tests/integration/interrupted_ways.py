"""What is done with a pool while it is interrupted; each returns the call itself."""

import contextlib
import gc
import threading
from collections.abc import Callable

import sharedpool
from sharedpool.worker.pool import Pool
from tests.support.waiting import wait_until

Way = Callable[[Pool, Pool], Callable[[], object]]


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

import threading
import time

from sharedpool.worker.recoverable_lock import RecoverableLock


def in_a_thread(turns: RecoverableLock, limit_s: float) -> bool:
    got: list[bool] = []
    thread = threading.Thread(target=lambda: got.append(turns.acquire(limit_s) is not None))
    thread.start()
    thread.join()
    return got[0]


def test_only_one_thread_has_a_turn() -> None:
    turns = RecoverableLock()
    turn = turns.acquire(0)
    assert turn is not None
    assert turns.locked
    assert not in_a_thread(turns, 0.1)
    turn.release()
    assert not turns.locked
    assert in_a_thread(turns, 0)


def test_a_thread_may_come_back_within_its_turn() -> None:
    turns = RecoverableLock()
    outer = turns.acquire(0)
    inner = turns.acquire(0)
    assert outer is not None
    assert inner is not None
    inner.release()
    assert not in_a_thread(turns, 0)
    outer.release()
    assert in_a_thread(turns, 0)


def test_a_turn_that_was_dropped_by_an_interrupt_is_over() -> None:
    turns = RecoverableLock()
    turn = turns.acquire(0)
    assert not in_a_thread(turns, 0)
    del turn
    assert in_a_thread(turns, 5)


def test_a_waiting_thread_goes_on_when_the_turn_ends() -> None:
    turns = RecoverableLock()
    turn = turns.acquire(0)
    assert turn is not None
    went_on: list[float] = []

    def wait() -> None:
        mine = turns.acquire(30)
        assert mine is not None
        went_on.append(time.monotonic())

    waiting = threading.Thread(target=wait)
    waiting.start()
    turn.release()
    waiting.join(10)
    assert went_on

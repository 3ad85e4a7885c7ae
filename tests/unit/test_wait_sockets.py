"""Wait sockets in the lane: who closes a wait socket's descriptor, who wakes its thread, and who is
next where there are too few.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from sharedpool.descriptors.owned import Owned
from sharedpool.descriptors.readable import readable
from sharedpool.descriptors.wakeup import WaitLock
from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import Lane
from sharedpool.lane.wait_sockets import WaitSocket, WaitSockets
from sharedpool.wire.desk import Moved
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(not lanes.SUPPORTED, reason="there is no lane on this platform")


class Rig:
    def __init__(self) -> None:
        self.lane = Lane(lanes.make(), 1)
        self.received: list[Moved] = []
        self.wait_sockets = WaitSockets(self.lane, 0, self._receive)

    def _receive(self, moved: Moved, sock: Owned) -> None:
        sock.close()
        self.received.append(moved)

    def take(self) -> WaitSocket:
        wait_socket = self.wait_sockets.take(None)
        assert wait_socket is not None
        return wait_socket

    def leave_none_but(self, count: int) -> None:
        """Have so many wait sockets, in place of `PLACES`."""
        del self.wait_sockets._places[count:]

    def close(self) -> None:
        self.wait_sockets.disown()
        self.lane.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def is_woken(wait_socket: WaitSocket) -> bool:
    return bool(readable([wait_socket.fileno()], 0))


# --- whose the descriptor is


def test_a_wait_socket_is_closed_by_the_thread_that_has_it(rig: Rig) -> None:
    """Linux's `poll` looks a number up again when it is woken: closed under a thread, it would wait
    for another file's.

    (On Linux, and without this, the thread below would sleep on: its number is the pipe's by then.)
    """
    wait_socket = rig.take()
    over = threading.Event()
    waits = threading.Thread(target=lambda: (wait_socket.wait(60), over.set()))
    waits.start()
    wait_until(lambda: _polls(waits))
    rig.lane.close()
    rig.wait_sockets.close()
    pipe = os.pipe()
    try:
        assert wait_socket.fileno() not in pipe
        assert over.wait(20)
        rig.wait_sockets.give_back(wait_socket)
        assert wait_socket.fileno() == -1
    finally:
        for fd in pipe:
            os.close(fd)
        waits.join(60)


def _polls(thread: threading.Thread) -> bool:
    """Return True if a thread is in `poll`, or if the kernel does not tell."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/wchan") as file:
            return "poll" in file.read()
    except OSError:
        return True


def test_free_wait_sockets_are_closed_at_once(rig: Rig) -> None:
    wait_socket, other = rig.take(), rig.take()
    rig.wait_sockets.give_back(wait_socket)
    rig.wait_sockets.close()
    assert wait_socket.fileno() == -1
    assert other.fileno() >= 0
    assert is_woken(other)


def test_a_forked_child_closes_all_wait_sockets(rig: Rig) -> None:
    wait_socket, other = rig.take(), rig.take()
    rig.wait_sockets.give_back(wait_socket)
    rig.wait_sockets.disown()
    assert (wait_socket.fileno(), other.fileno()) == (-1, -1)


def test_once_the_lane_is_left_only_the_link_reads_what_has_come(rig: Rig) -> None:
    wait_socket = rig.take()
    wait_socket.wake()
    rig.lane.close()
    assert wait_socket.read() is None
    assert is_woken(wait_socket)
    assert list(rig.wait_sockets.drain()) == []
    assert not is_woken(wait_socket)


# --- who wakes its thread


@pytest.mark.parametrize("look", [WaitSockets.receive_strays, WaitSockets.check_all])
def test_a_thread_whose_wake_up_was_read_as_it_took_its_wait_socket_is_woken_again(
    rig: Rig, look: object
) -> None:
    """The link's thread has listed the free wait sockets; before it reads one, a thread takes it,
    and is granted a lease.
    """
    wait_socket = rig.take()
    wait_socket.is_quiet = False
    rig.wait_sockets.give_back(wait_socket)
    read = wait_socket.read

    def takes_and_is_woken() -> tuple[Moved, Owned] | None:
        assert rig.wait_sockets.take(None) is wait_socket
        wait_socket.wake()
        return read()

    wait_socket.read = takes_and_is_woken  # type: ignore[method-assign]
    look(rig.wait_sockets)  # type: ignore[operator]
    assert is_woken(wait_socket)


# --- too few


def test_threads_get_wait_sockets_in_the_order_in_which_they_queued(rig: Rig) -> None:
    rig.leave_none_but(1)
    wait_socket, first, second = rig.take(), WaitLock(), WaitLock()
    for lock in (first, second):
        assert rig.wait_sockets.take(None, lock) is None
        rig.wait_sockets.line_up(lock)
    rig.wait_sockets.give_back(wait_socket)
    assert rig.wait_sockets.take(None) is None  # newcomers, and who had it just now
    assert rig.wait_sockets.take(None, second) is None
    assert rig.wait_sockets.take(None, first) is wait_socket
    rig.wait_sockets.give_back(wait_socket)
    assert rig.wait_sockets.take(None, second) is wait_socket
    rig.wait_sockets.give_back(wait_socket)
    assert rig.wait_sockets.take(None) is wait_socket


@pytest.mark.parametrize("ends", ["it steps out", "it is interrupted"])
def test_a_wait_socket_that_its_first_does_not_come_for_is_the_next_ones(
    rig: Rig, ends: str
) -> None:
    rig.leave_none_but(1)
    wait_socket, second = rig.take(), WaitLock()
    first = WaitLock()
    rig.wait_sockets.line_up(first)
    rig.wait_sockets.line_up(second)
    if ends == "it steps out":
        rig.wait_sockets.give_back(wait_socket)  # wakes the first
        rig.wait_sockets.step_out(first)
    else:
        del first
        rig.wait_sockets.give_back(wait_socket)
    assert _was_woken(second)
    assert rig.wait_sockets.take(None, second) is wait_socket


def test_two_wait_sockets_that_come_back_at_once_call_two_threads(rig: Rig) -> None:
    rig.leave_none_but(2)
    wait_sockets, locks = [rig.take(), rig.take()], [WaitLock(), WaitLock()]
    for lock in locks:
        rig.wait_sockets.line_up(lock)
    for wait_socket in wait_sockets:
        rig.wait_sockets.give_back(wait_socket)
    for lock in locks:
        assert _was_woken(lock)
        assert rig.wait_sockets.take(None, lock) in wait_sockets


def _was_woken(lock: WaitLock) -> bool:
    return lock._lock.acquire(blocking=False)

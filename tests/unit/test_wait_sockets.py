"""Wait sockets in the lane: who closes a wait socket's descriptor, who wakes its thread, and who is next where there
are too few.
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
        self.seats = WaitSockets(self.lane, 0, self._receive)

    def _receive(self, moved: Moved, sock: Owned) -> None:
        sock.close()
        self.received.append(moved)

    def take(self) -> WaitSocket:
        seat = self.seats.take(None)
        assert seat is not None
        return seat

    def leave_none_but(self, count: int) -> None:
        """Have so many wait sockets, in place of `PLACES`."""
        del self.seats._places[count:]

    def close(self) -> None:
        self.seats.disown()
        self.lane.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def is_rung(seat: WaitSocket) -> bool:
    return bool(readable([seat.fileno()], 0))


# --- whose the descriptor is


def test_a_seat_is_closed_by_the_thread_that_has_it(rig: Rig) -> None:
    """Linux's `poll` looks a number up again when it is woken: closed under a thread, it would wait for another file's.

    (On Linux, and without this, the thread below would sleep on: its number is the pipe's by then.)
    """
    seat = rig.take()
    over = threading.Event()
    waits = threading.Thread(target=lambda: (seat.wait(60), over.set()))
    waits.start()
    wait_until(lambda: _polls(waits))
    rig.lane.close()
    rig.seats.close()
    pipe = os.pipe()
    try:
        assert seat.fileno() not in pipe
        assert over.wait(20)
        rig.seats.give_back(seat)
        assert seat.fileno() == -1
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


def test_free_seats_are_closed_at_once(rig: Rig) -> None:
    seat, other = rig.take(), rig.take()
    rig.seats.give_back(seat)
    rig.seats.close()
    assert seat.fileno() == -1
    assert other.fileno() >= 0
    assert is_rung(other)


def test_a_forked_child_closes_all_seats(rig: Rig) -> None:
    seat, other = rig.take(), rig.take()
    rig.seats.give_back(seat)
    rig.seats.disown()
    assert (seat.fileno(), other.fileno()) == (-1, -1)


def test_once_the_lane_is_left_only_the_link_reads_what_has_come(rig: Rig) -> None:
    seat = rig.take()
    seat.wake()
    rig.lane.close()
    assert seat.read() is None
    assert is_rung(seat)
    assert list(rig.seats.drain()) == []
    assert not is_rung(seat)


# --- who wakes its thread


@pytest.mark.parametrize("look", [WaitSockets.receive_strays, WaitSockets.check_all])
def test_a_thread_whose_ring_was_read_as_it_took_its_seat_is_rung_again(
    rig: Rig, look: object
) -> None:
    """The link's thread has listed the free wait sockets; before it reads one, a thread takes it, and is granted a
    lease.
    """
    seat = rig.take()
    seat.is_quiet = False
    rig.seats.give_back(seat)
    read = seat.read

    def takes_and_is_rung() -> tuple[Moved, Owned] | None:
        assert rig.seats.take(None) is seat
        seat.wake()
        return read()

    seat.read = takes_and_is_rung  # type: ignore[method-assign]
    look(rig.seats)  # type: ignore[operator]
    assert is_rung(seat)


# --- too few


def test_threads_get_seats_in_the_order_in_which_they_queued(rig: Rig) -> None:
    rig.leave_none_but(1)
    seat, first, second = rig.take(), WaitLock(), WaitLock()
    for gate in (first, second):
        assert rig.seats.take(None, gate) is None
        rig.seats.line_up(gate)
    rig.seats.give_back(seat)
    assert rig.seats.take(None) is None  # newcomers, and who had it just now
    assert rig.seats.take(None, second) is None
    assert rig.seats.take(None, first) is seat
    rig.seats.give_back(seat)
    assert rig.seats.take(None, second) is seat
    rig.seats.give_back(seat)
    assert rig.seats.take(None) is seat


@pytest.mark.parametrize("ends", ["it steps out", "it is interrupted"])
def test_a_seat_that_its_first_does_not_come_for_is_the_next_ones(rig: Rig, ends: str) -> None:
    rig.leave_none_but(1)
    seat, second = rig.take(), WaitLock()
    first = WaitLock()
    rig.seats.line_up(first)
    rig.seats.line_up(second)
    if ends == "it steps out":
        rig.seats.give_back(seat)  # rings the first
        rig.seats.step_out(first)
    else:
        del first
        rig.seats.give_back(seat)
    assert _was_rung(second)
    assert rig.seats.take(None, second) is seat


def test_two_seats_that_come_back_at_once_call_two_threads(rig: Rig) -> None:
    rig.leave_none_but(2)
    seats, gates = [rig.take(), rig.take()], [WaitLock(), WaitLock()]
    for gate in gates:
        rig.seats.line_up(gate)
    for seat in seats:
        rig.seats.give_back(seat)
    for gate in gates:
        assert _was_rung(gate)
        assert rig.seats.take(None, gate) in seats


def _was_rung(gate: WaitLock) -> bool:
    return gate._lock.acquire(blocking=False)

"""A lane's end, and descriptors that are none of a lane, or no longer."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket

import pytest

from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import Lane
from tests.unit.lane_driver import Rig, open_descriptors, rig

__all__ = ["rig"]  # pytest finds it here

pytestmark = pytest.mark.skipif(not lanes.SUPPORTED, reason="no lane on this platform")


def test_a_closed_lane_does_nothing(rig: Rig) -> None:
    ticket, item = rig.b.wait(0, 5), rig.connection()
    rig.a.lane.close()
    assert not rig.a.lane.add_ticket(ticket)
    assert rig.a.lane.next_ticket() is None
    assert not rig.a.lane.give(item)
    assert rig.a.lane.take_from_shelf() is None
    rig.a.lane.wake(ticket)
    rig.a.lane.close()
    assert rig.b.lane.next_ticket() == ticket  # nothing was taken out of the queue
    assert rig.b.came(0) is None


def test_making_and_closing_leaves_nothing_open() -> None:
    before = open_descriptors()
    fds = lanes.make()
    assert len(fds) == lanes.DESCRIPTORS
    lane = Lane(fds, 1)
    assert len(open_descriptors()) - len(before) <= lanes.FOR_A_LANE
    lane.close()
    assert open_descriptors() == before


def test_a_lane_that_cannot_be_entered_is_closed_once() -> None:
    """Where there is no descriptor left. What gets the numbers afterwards is somebody else's."""
    before = open_descriptors()
    fds = lanes.make()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 1, hard))
    spare: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.dup(0))
        with pytest.raises(OSError, match="Too many open files"):
            Lane(fds, 1)
        others = [os.open(os.devnull, os.O_RDONLY) for _ in fds]
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [open_descriptors().get(fd) for fd in others] == [os.devnull] * len(others)
    for fd in [*spare, *others]:
        os.close(fd)
    assert open_descriptors() == before


@pytest.mark.parametrize("bad", [1, 2, 3, 4])
def test_descriptors_that_are_no_lanes_are_let_go_of(bad: int) -> None:
    """A pipe's end is not told from any other file; a socket is."""
    before = open_descriptors()
    fds = lanes.make()
    os.close(fds[bad])
    fds[bad] = os.open(os.devnull, os.O_RDWR)
    try:
        Lane(fds, 1).close()
    except OSError:
        assert bad > 2
    assert open_descriptors() == before


class Reused:
    """A program that has closed descriptors which were not its own, and whatever got
    their numbers."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.pairs = []
        for number in numbers:
            ours, theirs = socket.socketpair()
            os.dup2(theirs.fileno(), number)
            theirs.close()
            ours.setblocking(False)
            self.pairs.append(ours)

    def untouched(self) -> bool:
        """Return True if the socket is open and nothing was written to it or read from it."""
        for ours, number in zip(self.pairs, self.numbers, strict=True):
            try:
                ours.recv(100)
                return False  # written, or closed
            except BlockingIOError:
                pass
            ours.send(b"news")
            theirs = socket.socket(fileno=os.dup(number))
            theirs.setblocking(False)
            with theirs:
                if theirs.recv(100) != b"news":
                    return False
        return True

    def close(self) -> None:
        for ours, number in zip(self.pairs, self.numbers, strict=True):
            ours.close()
            os.close(number)


def test_a_descriptor_that_is_somebody_elses_by_now_is_not_read_written_or_closed(rig: Rig) -> None:
    before = set(open_descriptors())
    lane = Lane([os.dup(fd) for fd in rig.fds], 3)
    reused = Reused(sorted(set(open_descriptors()) - before))
    for ours in reused.pairs:
        ours.send(b"a ticket's worth of bytes")
    ticket, item = rig.b.wait(0, 5), rig.connection(holder=3)
    assert not lane.add_ticket(ticket)
    assert lane.next_ticket() is None
    assert not lane.give(item)
    assert lane.take_from_shelf() is None
    lane.wake(ticket)
    lane.close()
    del lane
    gc.collect()
    for number in reused.numbers:
        assert os.read(number, 100) == b"a ticket's worth of bytes"
    assert reused.untouched()
    reused.close()
    assert rig.b.came(0) is None


def test_a_lane_whose_descriptors_another_thread_has_closed_is_at_its_end(rig: Rig) -> None:
    """The descriptors are gone: the lane does nothing, and raises nothing."""
    before = set(open_descriptors())
    lane = Lane([os.dup(fd) for fd in rig.fds], 3)
    for number in set(open_descriptors()) - before:
        os.close(number)
    ticket = rig.b.wait(0, 5)
    assert not lane.add_ticket(ticket)
    assert lane.next_ticket() is None
    assert not lane.give(rig.connection(holder=3))
    assert lane.take_from_shelf() is None
    lane.close()


def test_the_last_process_of_a_shelf_is_not_kept_busy_by_its_end(rig: Rig) -> None:
    """All other ends are closed, this one's own by somebody who had no right to: then the shelf is
    at its end."""
    fds = lanes.make()
    lane = Lane(fds, 1)
    os.close(fds[3])
    assert lane.take_from_shelf() is None
    lane.close()

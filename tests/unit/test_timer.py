"""The timer that wakes who waits for descriptors: when it fires, and whose number it
leaves alone."""

from __future__ import annotations

import os
import resource
import select
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from sharedpool.descriptors.readable import readable
from sharedpool.descriptors.timer import Timer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel has no timerfd")

SOON_S, LATER_S = 0.02, 30.0


@pytest.fixture
def timer() -> Iterator[Timer]:
    timer = Timer()
    yield timer
    timer.close()


def fires(timer: Timer, within_s: float = 5.0) -> bool:
    return bool(readable([timer], within_s))


def test_a_timer_fires_at_its_time_and_not_before(timer: Timer) -> None:
    began = time.monotonic()
    timer.arm(SOON_S)
    assert fires(timer)
    assert time.monotonic() - began >= SOON_S


def test_a_timer_is_silent_until_it_is_set(timer: Timer) -> None:
    assert not fires(timer, 0)
    timer.disarm()
    assert not fires(timer, 0)


def test_a_time_that_is_set_is_not_put_off(timer: Timer) -> None:
    timer.arm(SOON_S)
    timer.arm(LATER_S)
    assert fires(timer)


def test_more_than_a_second_is_more_than_a_second(timer: Timer) -> None:
    timer.arm(1.5)
    assert not fires(timer, 0.6)


def test_disarmed_it_does_not_fire_and_can_be_set_again(timer: Timer) -> None:
    timer.arm(SOON_S)
    timer.disarm()
    assert not fires(timer, 3 * SOON_S)
    timer.arm(SOON_S)
    assert fires(timer)


def test_once_hushed_it_is_silent_and_can_be_set_again(timer: Timer) -> None:
    timer.arm(SOON_S)
    assert fires(timer)
    assert timer.armed
    timer.clear()
    assert not timer.armed
    assert not fires(timer, 0)
    timer.arm(SOON_S)
    assert fires(timer)


def test_closed_it_does_nothing(timer: Timer) -> None:
    number = timer.fileno()
    timer.close()
    assert timer.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    timer.arm(SOON_S)
    timer.clear()
    timer.disarm()
    timer.close()


@pytest.mark.parametrize("kind", ["eventfd", "epoll", "socket", "file"])
def test_a_number_that_is_something_elses_by_now_is_left_alone(timer: Timer, kind: str) -> None:
    """An event counter and a poller have the same inode as every timer."""
    ours, theirs = socket.socketpair()
    poller = select.epoll()
    fd = {
        "eventfd": lambda: os.eventfd(0),
        "epoll": lambda: os.dup(poller.fileno()),
        "socket": lambda: os.dup(theirs.fileno()),
        "file": lambda: os.open(os.devnull, os.O_RDWR),
    }[kind]()
    number = timer.fileno()
    os.dup2(fd, number)
    os.close(fd)
    if kind == "eventfd":
        os.eventfd_write(number, 7)
    ours.send(b"news")
    timer.arm(SOON_S)
    timer.clear()
    timer.arm(SOON_S)
    timer.disarm()
    timer.close()
    os.fstat(number)  # raises if it was closed
    if kind == "eventfd":
        assert os.eventfd_read(number) == 7
    assert theirs.recv(100) == b"news"
    os.close(number)
    poller.close()
    ours.close()
    theirs.close()


def test_where_no_descriptor_is_left_there_is_none_and_that_is_said() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="no timer can be made"):
            Timer()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

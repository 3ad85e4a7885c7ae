"""When a registration's heartbeats are due."""

from collections import deque
from typing import cast

import pytest

from sharedpool.wire.messages import PROTOCOL_VERSION, Welcome
from sharedpool.worker.link.registration import Endpoint, Registration


class Pool:
    """The part of a pool that a heartbeat asks."""

    holds = False

    def beat(self) -> bool:
        return self.holds


def welcomed(now: float, *, ttl_s: float, part: float = 1.0) -> Registration:
    registration = Registration(b"p", b"c", cast(Endpoint, Pool()), deque(), None)
    welcome = Welcome(PROTOCOL_VERSION, 1, 10, 60_000, int(ttl_s * 1000))
    registration.welcomed(welcome, now, part)
    return registration


def test_processes_at_rest_beat_at_the_same_moments() -> None:
    """The broker wakes once for all of them."""
    due = set()
    for number in range(10):
        registration = welcomed(100 + number / 10, ttl_s=15.0, part=number / 10)
        registration.beat(registration.due)
        registration.beat(registration.due)
        due.add(registration.due % 1)
        assert registration.due == int(registration.due)
    assert due == {0.0}


@pytest.mark.parametrize(("ttl_s", "pause_s"), [(15.0, 7.0), (4.0, 2.0), (3.0, 1.5), (1.0, 0.5)])
def test_no_heartbeat_is_later_than_the_ttl_asks(ttl_s: float, pause_s: float) -> None:
    registration = welcomed(100.0, ttl_s=ttl_s)
    registration.beat(200.0)
    assert registration.due == 200.0 + pause_s

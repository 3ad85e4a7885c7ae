"""A worker's cache, driven event by event with a clock of its own."""

from __future__ import annotations

import pytest

from sharedpool.wire.messages import Grant, Recall, ReleaseReason, ToBroker
from sharedpool.wire.values import Backend, Token
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.lease import Closing, Lease, Waiter


class Conn:
    """A connection, as far as the cache looks."""


class Rig:
    """A cache, a clock that stands still unless moved, and the broker's side of the line."""

    def __init__(self, expiration_s: float = 60.0, *, slice_s: float = 0.0) -> None:
        self.cache = Cache(expiration_s, slice_s=slice_s)
        self.messages = BrokerMessages(self.cache)
        self.now = 100.0
        self.messages.welcomed(1, 1, self.now)
        self.serial = 0
        self.news = 0
        self.kept: list[object] = []

    def want(self, wait_s: float = 5.0) -> Waiter:
        waiter = Waiter(lambda: None, self.now)
        self.cache.waiters.enqueue(waiter, wait_s)
        return waiter

    def grant(
        self, request: int, *, returns_due: int = 0, serial: int | None = None
    ) -> Waiter | None:
        self.serial += 1
        self.news += 1
        return self.messages.granted(
            Grant(request, Token(1, serial or self.serial), self.news, returns_due), self.now
        )

    def recall(
        self, take: int = 0, returns_due: int = 0, *, expired: bool = False, answer: bool = True
    ) -> list[Closing]:
        self.news += 1
        return self.messages.recalled(
            Recall(self.news, take, returns_due, expired, answer), self.now, {}
        )

    def lend(self, retire_at: float = float("inf")) -> tuple[Lease, Conn]:
        """Check out a new connection."""
        waiter = self.want()
        assert self.grant(waiter.request) is waiter
        lease, conn = waiter.lease, Conn()
        assert lease is not None
        self.cache.opened(lease, Backend(lease.token.serial), retire_at, conn, self.now)
        self.kept += [waiter, conn]
        return lease, conn

    def idle(self, retire_at: float = float("inf")) -> Lease:
        lease, conn = self.lend(retire_at)
        assert self.cache.checkin(lease, conn, self.now, None) is None
        self.now += 1
        return lease

    def sent(self) -> list[ToBroker]:
        out = list(self.cache.outbox)
        self.cache.outbox.clear()
        return out


@pytest.fixture
def rig() -> Rig:
    return Rig()


class Interrupt(BaseException):
    """What a signal handler raises."""


def interrupt(*_: object) -> None:
    raise Interrupt


def reason_of(outcome: Closing | Waiter | None) -> ReleaseReason:
    assert isinstance(outcome, Closing)
    return outcome.reason

"""Threads in the lane, which go on by a step whenever they are asked to: one that waits at a wait
socket, one that gives."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar, cast

from sharedpool.lane.lane import Ticket
from sharedpool.lane.wait_sockets import _AGAIN_LIMIT_S, AGAIN_S
from sharedpool.wire.desk import Live, Moved
from sharedpool.worker.core.lease import Closing, Waiter
from tests.model.desk import Conn
from tests.model.lane import End, Got, Grip
from tests.model.network import Packet

T = TypeVar("T")
Steps = Generator[None, None, None]


@dataclass(eq=False, slots=True)
class WaitSocket:
    """Where a thread waits: `wait_sockets.WaitSocket`."""

    end: End
    place: int
    box: deque[Packet | None]
    request: int = 0
    once: bool = True
    again_s: float = AGAIN_S
    settled: bool = True
    looks: int = -1  # in vain, while it is free and unsettled

    @property
    def bound(self) -> bool:
        return self.end.open

    def enter(self, request: int) -> Generator[None, None, float]:
        again = self.request == request
        self.again_s = min(2 * self.again_s, _AGAIN_LIMIT_S) if again else AGAIN_S
        self.request, self.settled = request, False
        self.end.board.take_place(self.place, request)
        yield
        self.once = not again
        self.end.queue(Ticket(self.end.member_number, self.place, request))
        yield
        return self.again_s

    def read(self, grip: Grip) -> Got | None:
        if not self.bound:
            return None
        got = self.end.receive(self.box, grip)
        if got is not None and got[0].request == self.request:
            self.settled = self.once
        return got

    def peek(self) -> Moved | None:
        packet = self.box[0] if self.bound and self.box else None
        return packet.message if packet is not None and isinstance(packet.message, Moved) else None

    def wake(self) -> None:
        self.end.wake(Ticket(self.end.member_number, self.place, 0))


@dataclass(eq=False, slots=True)
class Thread:
    """A thread that waits at a wait socket.

    `until` is what it is blocked for; `hand` what it has taken and not adopted.
    """

    wait_socket: WaitSocket
    deadline: float
    waiter: Waiter | None  # none on the fast path
    steps: Steps = field(default_factory=lambda: _nothing())
    grip: Grip = field(default_factory=lambda: Grip(b""))
    until: Callable[[], bool] | None = None
    hand: Got | None = None

    @property
    def ready(self) -> bool:
        return self.until is None or self.until()


@dataclass(eq=False, slots=True)
class LaneGiving:
    """A thread that gives in the lane."""

    closing: Closing
    conn: Conn
    live: Live
    grip: Grip
    steps: Steps = field(default_factory=lambda: _nothing())


def _nothing() -> Steps:
    yield


def run(steps: Generator[None, None, T]) -> T:
    """Do it in one go."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast("T", end.value)

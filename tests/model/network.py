"""What is on its way: a session's messages in both directions and its sockets to the desk.

A good network keeps the order within each line. `lose`, `double`, `delay` and `late` are what a bad one does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sharedpool.wire.messages import Hello, ToBroker, Token, ToWorker

from .server import Proc


class Parcel(NamedTuple):
    """A socket on its way to the desk."""

    token: Token
    proc: Proc


@dataclass(eq=False)
class Line:
    """All lines of one session. They outlive its process: last words."""

    session: bytes
    up: deque[ToBroker] = field(default_factory=deque)
    down: deque[ToWorker] = field(default_factory=deque)
    desk: deque[Parcel] = field(default_factory=deque)

    def __bool__(self) -> bool:
        return bool(self.up or self.down or self.desk)

    def break_off(self, lost: int) -> None:
        """The broker died: lose some of what was on its way, the newest of its own words, all that lay at its desk."""
        for _ in range(lost % (len(self.up) + 1)):
            self.up.popleft()
        for _ in range(lost // 5 % (len(self.down) + 1)):
            self.down.pop()
        self.drop_parcels()

    def drop_parcels(self) -> None:
        """The desk line is closed at the broker's end."""
        while self.desk:
            self.desk.popleft().proc.holders.discard("flight")

    def drop_hellos(self) -> None:
        """A link that starts over does not leave its unanswered HELLOs behind."""
        if any(isinstance(message, Hello) for message in self.up):
            self.up = deque(message for message in self.up if not isinstance(message, Hello))


class Network:
    """All lines, and in `limbo` what comes late."""

    def __init__(self) -> None:
        self.lines: dict[bytes, Line] = {}
        self.limbo: list[tuple[Line, str, Any]] = []

    def line(self, session: bytes) -> Line:
        """Return a session's lines, made when it is new."""
        return self.lines.setdefault(session, Line(session))

    def _ways(self) -> list[tuple[Line, str]]:
        return [(line, way) for line in self.lines.values() for way in ("up", "down") if getattr(line, way)]

    @property
    def busy(self) -> bool:
        """Whether anything can be lost."""
        return any(line.up or line.down for line in self.lines.values())

    def lose(self, pick: int) -> None:
        """Lose the next message of some line."""
        if ways := self._ways():
            line, way = ways[pick % len(ways)]
            getattr(line, way).popleft()

    def double(self, pick: int) -> None:
        """Have the next message of some line arrive again: at once, or behind the others, or late."""
        if ways := self._ways():
            line, way = ways[pick % len(ways)]
            queue = getattr(line, way)
            match pick // len(ways) % 3:
                case 0:
                    queue.appendleft(queue[0])
                case 1:
                    queue.append(queue[0])
                case _:
                    self.limbo.append((line, way, queue[0]))

    def delay(self, pick: int) -> None:
        """Have the others of some line overtake its next message; or hold it back for long."""
        if ways := self._ways():
            line, way = ways[pick % len(ways)]
            queue = getattr(line, way)
            if pick // len(ways) % 2:
                queue.rotate(-1)
            else:
                self.limbo.append((line, way, queue.popleft()))

    def late(self, pick: int) -> None:
        """Have a message arrive that was held back."""
        if self.limbo:
            line, way, message = self.limbo.pop(pick % len(self.limbo))
            getattr(line, way).appendleft(message)

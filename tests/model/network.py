"""What is on its way: a session's messages in both directions, and packets on the lines to the
desk.

A good network keeps the order of each session's messages. `lose`, `double`, `delay` and `late` are
what a bad one does. The desk's lines are apart from it: the kernel loses and reorders nothing
there, but a line is torn when the process at either end dies or closes it, with what lies in it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from sharedpool.wire.desk import FromDesk, Moved, ToDesk
from sharedpool.wire.messages import Hello, ToBroker, ToWorker
from tests.model.server import Proc


@dataclass(eq=False, slots=True)
class Packet:
    """One packet on a line to the desk; `proc` is whose socket it carries: it holds it open."""

    message: ToDesk | FromDesk | Moved
    proc: Proc | None = None
    lane: object = None  # whose descriptors it carries

    def take(self) -> Proc | None:
        """Take the socket out."""
        if self.proc is not None:
            self.proc.holders.discard(self)
        return self.proc


@dataclass(eq=False, slots=True)
class Wire:
    """One SEQPACKET line to the desk: a session's. `number` is what the broker calls it.

    `accepted`: the broker has looked at it; before that it may be turned away, with what was said.
    `left`: closed at the worker's end; `torn`: closed at the broker's.
    """

    session: bytes
    number: int
    up: deque[Packet] = field(default_factory=deque)
    down: deque[Packet] = field(default_factory=deque)
    accepted: bool = False
    left: bool = False
    torn: bool = False

    @property
    def ready(self) -> bool:
        """Whether the broker has something to read."""
        return bool(self.up) or self.left

    def say(self, message: ToDesk, proc: Proc | None = None) -> bool:
        """Send to the broker; return whether that was done."""
        return not (self.left or self.torn) and self._send(self.up, Packet(message, proc))

    def answer(self, message: FromDesk, proc: Proc | None = None, lane: object = None) -> bool:
        """Send to the worker; return whether that was done."""
        return not (self.left or self.torn) and self._send(self.down, Packet(message, proc, lane))

    @staticmethod
    def _send(way: deque[Packet], packet: Packet) -> bool:
        if packet.proc is not None:
            packet.proc.holders.add(packet)
        way.append(packet)
        return True

    def leave(self) -> None:
        """The worker closes its end: what it has not read is lost, what it has said is not."""
        self.left = True
        self._drop(self.down)

    def tear(self) -> None:
        """The broker closes its end.

        What it has said can still be read, unless it left something unread: Linux says ECONNRESET
        then.
        """
        self.torn = True
        if self.up:
            self._drop(self.down)
        self._drop(self.up)

    @staticmethod
    def _drop(way: deque[Packet]) -> None:
        while way:
            way.popleft().take()


@dataclass(eq=False)
class Line:
    """A session's messages. They outlive its process: last words."""

    session: bytes
    up: deque[ToBroker] = field(default_factory=deque)
    down: deque[ToWorker] = field(default_factory=deque)

    def __bool__(self) -> bool:
        return bool(self.up or self.down)

    def break_off(self, lost: int) -> None:
        """The broker died: lose some of what was on its way, the newest of its own words."""
        for _ in range(lost % (len(self.up) + 1)):
            self.up.popleft()
        for _ in range(lost // 5 % (len(self.down) + 1)):
            self.down.pop()

    def drop_hellos(self) -> None:
        """A link that starts over does not leave its unanswered HELLOs behind."""
        if any(isinstance(message, Hello) for message in self.up):
            self.up = deque(message for message in self.up if not isinstance(message, Hello))


class Network:
    """All sessions' lines, those to the desk that the broker has not closed, and in `limbo` what
    comes late."""

    def __init__(self) -> None:
        self.lines: dict[bytes, Line] = {}
        self.wires: list[Wire] = []
        self.limbo: list[tuple[Line, str, Any]] = []

    def line(self, session: bytes) -> Line:
        """Return a session's lines, made when it is new."""
        return self.lines.setdefault(session, Line(session))

    def tear(self, wire: Wire) -> None:
        """The broker closes its end of a line to the desk."""
        self.wires.remove(wire)
        wire.tear()

    def _ways(self) -> list[tuple[Line, str]]:
        return [
            (line, way)
            for line in self.lines.values()
            for way in ("up", "down")
            if getattr(line, way)
        ]

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
        """Have the next message of some line arrive again: at once, or behind the
        others, or late."""
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

"""The lane: its memory and pipes, as the kernel keeps them, and what a process does there
(`sharedpool/lane/lane.py`).

What takes several system calls in a real process is a generator here: whatever it yields at,
another process may go on, or this one be killed or frozen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import NamedTuple

from msgspec import structs

from sharedpool.lane.lane import Ticket
from sharedpool.wire.board import BOARD_BYTES, SHELF, Board
from sharedpool.wire.codec import decode_moved, encode
from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.values import Token
from tests.model.network import Packet
from tests.model.server import Proc

SHELF_ROOM = 11  # the kernel's max_dgram_qlen, and one
QUEUE_ROOM = 24  # much less than a pipe's
WAIT_SOCKET_ROOM = 11

Got = tuple[Moved, Proc]


class Grip:
    """A descriptor of a socket that nobody in its process writes to.

    `process`: the worker's session, or the broker.
    """

    def __init__(self, process: bytes) -> None:
        self.process = process


class MovingConnection(NamedTuple):
    """A connection that moves."""

    token: Token
    cell: int
    live: Live
    proc: Proc


class Lane:
    """One pool's under one broker. It lives as long as one process has it: `ends`.

    `wait_sockets` are the bound ones.
    """

    def __init__(self, pool: str, epoch: int) -> None:
        self.pool = pool
        self.epoch = epoch
        self.board = Board(memoryview(bytearray(BOARD_BYTES)))
        self.queue: deque[Ticket] = deque()
        self.shelf: deque[Packet] = deque()
        # By process and place. None in a queue is nothing but a wake-up.
        self.wait_sockets: dict[tuple[int, int], deque[Packet | None]] = {}
        self.ends: set[End] = set()
        self.moved = 0

    def bind(self, member_number: int, place: int) -> deque[Packet | None]:
        assert (member_number, place) not in self.wait_sockets, (
            "an address of the lane is used twice"
        )
        box: deque[Packet | None] = deque()
        self.wait_sockets[member_number, place] = box
        return box

    def unbind(self, member_number: int, place: int) -> None:
        _drop(self.wait_sockets.pop((member_number, place)))

    @property
    def lying(self) -> list[Proc]:
        """What is on the shelf, or in a wait socket."""
        packets = [*self.shelf, *(packet for box in self.wait_sockets.values() for packet in box)]
        return [packet.proc for packet in packets if packet is not None and packet.proc is not None]


def _drop(box: deque[Packet] | deque[Packet | None]) -> None:
    while box:
        packet = box.popleft()
        if packet is not None:
            packet.take()


class End:
    """One process's end of a lane."""

    def __init__(
        self,
        lane: Lane,
        member_number: int,
        process: bytes,
        refuse: Callable[[Moved], None] = lambda _: None,
        lacks: Callable[[], bool] = lambda: False,
    ) -> None:
        """`lacks`: there is no descriptor for what comes next."""
        self._refuse, self._lacks = refuse, lacks
        self.lane = lane
        self.board = lane.board
        self.member_number = member_number
        self.process = process
        self.open = True
        lane.ends.add(self)

    def close(self) -> None:
        self.open = False
        self.lane.ends.discard(self)
        for member_number, place in [
            key for key in self.lane.wait_sockets if key[0] == self.member_number
        ]:
            self.lane.unbind(member_number, place)
        if not self.lane.ends:
            _drop(self.lane.shelf)

    # --- tickets

    def queue(self, ticket: Ticket) -> bool:
        if not self.open:
            return False
        self.board.count_request()
        if len(self.lane.queue) >= QUEUE_ROOM:
            return False
        self.lane.queue.append(ticket)
        return True

    def next_ticket(self) -> Ticket | None:
        while self.open and self.lane.queue:
            ticket = self.lane.queue.popleft()
            if self.board.is_waiting_at(ticket.place, ticket.request):
                return ticket
        return None

    def wake(self, ticket: Ticket) -> None:
        box = self.lane.wait_sockets.get((ticket.member_number, ticket.place))
        if box is not None and len(box) < WAIT_SOCKET_ROOM:
            box.append(None)

    # --- giving and taking

    def give(self, item: MovingConnection) -> Generator[None, None, bool]:
        if (yield from self._deliver(item)):
            return True
        if not (yield from self._shelve(item)):
            return False
        yield
        while self.open and self.lane.queue:
            yield
            grip = Grip(self.process)
            taken = yield from self.take(grip)
            if taken is None:
                break
            moved, proc = taken
            other = MovingConnection(moved.token, moved.cell, moved.live, proc)
            if not (yield from self._deliver(other)) and not (yield from self._shelve(other)):
                proc.cut = True
            yield
            proc.holders.discard(grip)
        return True

    def _deliver(self, item: MovingConnection) -> Generator[None, None, bool]:
        ticket = self.next_ticket()
        while ticket is not None:
            yield
            if (
                yield from self._send(
                    item, ticket.request, ticket.member_number, (ticket.member_number, ticket.place)
                )
            ):
                return True
            ticket = self.next_ticket()
        return False

    def _shelve(self, item: MovingConnection) -> Generator[None, None, bool]:
        return (yield from self._send(item, 0, SHELF, None))

    def _send(
        self, item: MovingConnection, request: int, holder: int, wait_socket: tuple[int, int] | None
    ) -> Generator[None, None, bool]:
        if not self.open or not self.board.has(item.cell, item.token):
            return False
        moves = self.board.set_holder(item.cell, holder)
        yield
        message = decode_moved(encode(Moved(request, item.token, item.cell, moves, item.live)))
        box, room = (
            (self.lane.shelf, SHELF_ROOM)
            if wait_socket is None
            else (self.lane.wait_sockets.get(wait_socket), WAIT_SOCKET_ROOM)
        )
        if not self.open or box is None or len(box) >= room:
            self.board.set_holder(item.cell, self.member_number)
            return False
        packet = Packet(message, item.proc)
        item.proc.holders.add(packet)
        box.append(packet)
        self.lane.moved += 1
        return True

    def pass_on(self, member_number: int, place: int, moved: Moved, proc: Proc) -> bool:
        box = self.lane.wait_sockets.get((member_number, place))
        if box is None or len(box) >= WAIT_SOCKET_ROOM:
            return False
        packet = Packet(decode_moved(encode(moved)), proc)
        proc.holders.add(packet)
        box.append(packet)
        return True

    def take(self, grip: Grip) -> Generator[None, None, Got | None]:
        """Take from the shelf, by `grip`."""
        got = self.receive(self.lane.shelf, grip) if self.open else None
        if got is None:
            return None
        yield
        moved, proc = got
        return structs.replace(
            moved, moves=self.board.set_holder(moved.cell, self.member_number)
        ), proc

    def receive(self, box: deque[Packet] | deque[Packet | None], grip: Grip) -> Got | None:
        if not box:
            return None
        packet = box.popleft()
        if packet is None:
            return None
        moved, proc = packet.message, packet.take()
        assert isinstance(moved, Moved)
        assert proc is not None
        assert moved.live.backend == proc.backend, "a socket and a word of two different backends"
        fits = (
            self.board.has(moved.cell, moved.token)
            and moved.live.generation == self.board.generation
        )
        if (fits or moved.passed is not None) and not self._lacks():
            proc.holders.add(grip)
            return moved, proc
        self._refuse(moved)
        return None

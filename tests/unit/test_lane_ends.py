"""The lane between two processes' ends of it: who gets what, and what becomes of that which nobody
can have."""

from __future__ import annotations

import _socket
import contextlib
import gc
import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import structs

from sharedpool.descriptors import passing
from sharedpool.descriptors.owned import Owned
from sharedpool.descriptors.readable import readable
from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import Lane, MovingConnection, Ticket
from sharedpool.wire.board import CELLS, PLACES, SHELF
from sharedpool.wire.codec import encode
from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.values import Backend, Token

pytestmark = pytest.mark.skipif(not lanes.SUPPORTED, reason="no lane on this platform")

GENERATION = 3
LIVE = Live(Backend(7), GENERATION, b"parameters")


class Process:
    """One process's end of a lane."""

    def __init__(self, fds: list[int], number: int) -> None:
        self.refused: list[Moved] = []
        self.lane = Lane([os.dup(fd) for fd in fds], number, self.refused.append)
        self.number = number
        self.wait_sockets: dict[int, Any] = {}

    def wait(self, wait_socket: int, request: int, *, ticket: bool = True) -> Ticket:
        """Take a place, and queue a ticket for it."""
        place = self.number * PLACES + wait_socket
        if wait_socket not in self.wait_sockets:
            self.wait_sockets[wait_socket] = self.lane.wait_socket(place)
        self.lane.board.take_place(place, request)
        written = Ticket(self.number, place, request)
        assert not ticket or self.lane.add_ticket(written)
        return written

    def came(self, wait_socket: int) -> Moved | None:
        """Return what has come to a wait socket."""
        return unpacked(self.lane.receive(self.wait_sockets[wait_socket]))

    def taken(self) -> Moved | None:
        return unpacked(self.lane.take_from_shelf())

    def close(self) -> None:
        self.lane.close()
        for sock in self.wait_sockets.values():
            sock.close()


def unpacked(got: tuple[Moved, Owned] | None) -> Moved | None:
    if got is None:
        return None
    moved, sock = got
    assert sock.send(b"x") == 1  # it is the connection's
    sock.close()
    return moved


class Rig:
    """Two processes in a lane, and connections whose other ends are here."""

    def __init__(self) -> None:
        self.fds = lanes.make()
        self.a, self.b = Process(self.fds, 1), Process(self.fds, 2)
        self.board = self.a.lane.board
        self.board.generation = GENERATION
        self.ends: dict[int, socket.socket] = {}
        self.mine: dict[int, socket.socket] = {}
        self.serial = 0

    def connection(self, holder: int = 1) -> MovingConnection:
        self.serial += 1
        ours, theirs = socket.socketpair()
        self.ends[self.serial], self.mine[self.serial] = theirs, ours
        token = Token(1, self.serial)
        self.board.enter(self.serial, token, holder, 0)
        return MovingConnection(token, self.serial, LIVE, ours.fileno())

    def drop(self, item: MovingConnection) -> None:
        """Let go of the giver's own descriptor."""
        self.mine.pop(item.token.serial).close()

    def is_over(self, item: MovingConnection) -> bool:
        """Return True if every copy of the connection's socket is closed."""
        end = self.ends[item.token.serial]
        end.setblocking(False)
        try:
            while end.recv(100):
                pass
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self.a.close()
        self.b.close()
        for fd in self.fds:
            os.close(fd)
        for sock in [*self.ends.values(), *self.mine.values()]:
            sock.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            pass
    return found


def fill(wait_socket: socket.socket) -> None:
    """Put packets into a wait socket until there is no room for another."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        try:
            while True:
                sender.sendto(b"", wait_socket.getsockname())
        except BlockingIOError:
            pass


# --- tickets


def test_tickets_are_served_in_the_order_in_which_they_came_over_all_processes(rig: Rig) -> None:
    written = [rig.b.wait(0, 5), rig.a.wait(0, 5), rig.b.wait(1, 6)]
    assert [rig.a.lane.next_ticket(), rig.b.lane.next_ticket(), rig.a.lane.next_ticket()] == written
    assert rig.a.lane.next_ticket() is None


def test_a_stale_ticket_is_skipped(rig: Rig) -> None:
    """One who gave up; one who waits there for something else by now."""
    rig.b.wait(0, 5)
    rig.b.lane.board.leave_place(2 * PLACES)
    rig.b.wait(1, 6)
    rig.b.wait(1, 7, ticket=False)
    last = rig.b.wait(2, 8)
    assert rig.a.lane.next_ticket() == last
    assert rig.a.lane.next_ticket() is None


def test_a_queued_thread_is_seen_to_ask(rig: Rig) -> None:
    before = rig.board.requests
    rig.b.wait(0, 5)
    assert rig.board.requests != before


def test_a_full_queue_takes_no_ticket_and_says_so(rig: Rig) -> None:
    rig.b.wait(0, 5)
    count = 0
    while rig.b.lane.add_ticket(Ticket(2, 2 * PLACES, 5)):
        count += 1
        assert count < 1_000_000
    assert rig.a.lane.next_ticket() == Ticket(2, 2 * PLACES, 5)  # what is there is whole


# --- giving


def test_the_first_who_waits_gets_it_and_the_board_says_so_before_it_has_come(rig: Rig) -> None:
    rig.b.wait(0, 5)
    rig.a.wait(0, 6)
    item = rig.connection()
    assert rig.a.lane.give(item)
    assert tuple(rig.board.holding(item.cell)) == (2, 1)
    rig.drop(item)
    assert rig.b.came(0) == Moved(5, item.token, item.cell, 1, LIVE)
    assert rig.a.came(0) is None
    assert rig.is_over(item)  # the test has closed it: nobody else has it


def test_while_it_is_on_its_way_it_is_the_receivers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks at the board when the packet can be read finds the receiver there, not the
    giver."""
    rig.b.wait(0, 5)
    item = rig.connection()
    seen = []
    send = passing.send_with_to

    def look_and_send(sock: _socket.socket, packet: bytes, fd: int, address: str) -> None:
        seen.append(rig.board.holding(item.cell).holder)
        send(sock, packet, fd, address)

    monkeypatch.setattr(passing, "send_with_to", look_and_send)
    assert rig.a.lane.give(item)
    assert seen == [2]


def test_a_wait_socket_that_is_gone_leads_to_the_next_ticket(rig: Rig) -> None:
    rig.b.wait(0, 5)
    rig.b.wait(1, 6)
    rig.b.wait_sockets[0].close()
    item = rig.connection()
    assert rig.a.lane.give(item)
    assert (came := rig.b.came(1)) is not None
    assert (came.request, came.moves) == (6, 3)  # to the first, back, to the second
    assert tuple(rig.board.holding(item.cell)) == (2, 3)


def test_a_wait_socket_that_is_full_leads_to_the_next_ticket(rig: Rig) -> None:
    rig.b.wait(0, 5)
    rig.b.wait(1, 6)
    fill(rig.b.wait_sockets[0])
    assert rig.a.lane.give(rig.connection())
    assert (came := rig.b.came(1)) is not None
    assert came.request == 6


def test_where_no_wait_socket_can_be_reached_it_is_shelved(rig: Rig) -> None:
    rig.b.wait(0, 5)
    rig.b.wait_sockets[0].close()
    item = rig.connection()
    assert rig.a.lane.give(item)
    assert rig.board.holding(item.cell).holder == SHELF
    assert (taken := rig.b.taken()) is not None
    assert taken.token == item.token


def test_a_ring_wakes_and_brings_nothing(rig: Rig) -> None:
    ticket = rig.b.wait(0, 5)
    rig.a.lane.wake(ticket)
    rig.a.lane.give(rig.connection())
    assert rig.b.came(0) is None
    assert rig.b.came(0) is not None


# --- the shelf


def test_the_shelf_is_first_in_first_out_and_whose_it_is_then_is_on_the_board(rig: Rig) -> None:
    items = [rig.connection() for _ in range(3)]
    for item in items:
        assert rig.a.lane.give(item)
        assert tuple(rig.board.holding(item.cell)) == (SHELF, 1)
    taken = [rig.b.taken() for _ in items]
    assert taken == [Moved(0, item.token, item.cell, 2, LIVE) for item in items]
    assert [tuple(rig.board.holding(item.cell)) for item in items] == [(2, 2)] * 3
    assert rig.b.taken() is None


def test_a_connection_behind_a_useless_one_is_found(rig: Rig) -> None:
    """Who looks once and finds nothing goes to wait, and nobody would bring it."""
    useless, good = rig.connection(), rig.connection()
    rig.a.lane.give(useless)
    rig.a.lane.give(good)
    rig.board.remove(useless.cell)
    assert (taken := rig.b.taken()) is not None
    assert taken.token == good.token


class Latecomer(Lane):
    """A process that, between its look for tickets and its laying on the shelf, is held up:
    meanwhile another waits."""

    meanwhile: list[Process]

    def _shelve(self, item: MovingConnection) -> bool:
        while self.meanwhile:
            process = self.meanwhile.pop()
            process.wait(0, 5)
            assert process.taken() is None  # its look at the shelf, which is empty still
        return super()._shelve(item)


def test_a_second_look_after_shelving_serves_who_has_come_meanwhile(rig: Rig) -> None:
    late = Latecomer([os.dup(fd) for fd in rig.fds], 3)
    late.meanwhile = [rig.b]
    item = rig.connection(holder=3)
    assert late.give(item)
    late.close()
    assert rig.b.came(0) == Moved(
        5, item.token, item.cell, 3, LIVE
    )  # to the shelf, off it, to the wait socket
    assert tuple(rig.board.holding(item.cell)) == (2, 3)
    rig.drop(item)
    assert rig.is_over(item)


def test_the_faster_of_two_at_the_shelf_leaves_the_others_ticket_in_the_queue(rig: Rig) -> None:
    class Robbed(Lane):
        def take_from_shelf(self) -> tuple[Moved, Owned] | None:
            assert rig.b.taken() is not None
            return super().take_from_shelf()

        def _shelve(self, item: MovingConnection) -> bool:
            rig.a.wait(0, 9)
            return super()._shelve(item)

    robbed = Robbed([os.dup(fd) for fd in rig.fds], 3)
    assert robbed.give(rig.connection(holder=3))
    robbed.close()
    assert rig.b.lane.next_ticket() == Ticket(1, PLACES, 9)


def test_on_a_full_shelf_it_stays_its_givers(rig: Rig) -> None:
    given = 0
    while rig.a.lane.give(item := rig.connection()):
        given += 1
        assert given < 10_000
    assert given > 1
    assert rig.board.holding(item.cell).holder == 1
    rig.ends[item.token.serial].setblocking(False)
    with pytest.raises(BlockingIOError):
        rig.ends[item.token.serial].recv(1)  # open
    rig.drop(item)
    assert rig.is_over(item)


def test_a_lease_that_is_not_on_the_board_is_not_given(rig: Rig) -> None:
    rig.b.wait(0, 5)
    item = rig.connection()
    rig.board.remove(item.cell)
    assert not rig.a.lane.give(item)
    assert (rig.b.came(0), rig.b.taken()) == (None, None)
    assert not rig.a.lane.give(item._replace(cell=CELLS + 5))


# --- what is dropped


def packet(
    rig: Rig, item: MovingConnection, *, live: Live = LIVE, cell: int | None = None
) -> bytes:
    return rig.board.secret + encode(
        Moved(5, item.token, item.cell if cell is None else cell, 1, live)
    )


# Nobody waits any longer for a connection of which such a packet tells.
TOLD = ["generation", "struck", "another's cell", "no cell", "two sockets", "no socket"]


@pytest.mark.parametrize("case", [*TOLD, "secret", "nonsense", "empty"])
@pytest.mark.parametrize("where", ["wait_socket", "shelf"])
def test_a_packet_that_is_not_as_it_should_be_is_dropped_and_its_socket_closed(
    rig: Rig, case: str, where: str
) -> None:
    """That no descriptor was free for its socket looks as if none had come."""
    rig.b.wait(0, 5)
    item, other = rig.connection(), rig.connection()
    said = packet(rig, item)
    fds = [item.fd]
    if case == "secret":
        said = bytes(16) + said[16:]
    elif case == "generation":
        said = packet(rig, item, live=structs.replace(LIVE, generation=GENERATION - 1))
    elif case == "struck":
        rig.board.remove(item.cell)
    elif case == "another's cell":
        said = packet(rig, item, cell=other.cell)
    elif case == "no cell":
        said = packet(rig, item, cell=CELLS + 7)
    elif case == "nonsense":
        said = rig.board.secret + b"\xc1"
    elif case == "two sockets":
        fds.append(other.fd)
    elif case == "no socket":
        fds.clear()
    elif case == "empty":
        said = b""
    if where == "wait_socket":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(rig.b.wait_sockets[0].getsockname())
            passing.send_with_all(sender, said, fds)
    elif said:  # an empty packet cannot be told from the end there
        passing.send_with_all(rig.a.lane._shelf_in, said, fds)  # type: ignore[arg-type]
    before = open_descriptors()
    assert rig.b.came(0) is None if where == "wait_socket" else rig.b.taken() is None
    assert open_descriptors() == before
    assert [moved.token for moved in rig.b.refused] == ([item.token] if case in TOLD else [])
    rig.drop(item)
    assert rig.is_over(item)


def test_a_packet_that_is_as_it_should_be_is_received(rig: Rig) -> None:
    """The counterpart of the above."""
    rig.b.wait(0, 5)
    item = rig.connection()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(rig.b.wait_sockets[0].getsockname())
        passing.send_with_all(sender, packet(rig, item), [item.fd])
    assert rig.b.came(0) == Moved(5, item.token, item.cell, 1, LIVE)


def test_a_packet_that_is_only_looked_at_is_read_by_the_same_rules(rig: Rig) -> None:
    item = rig.connection()
    assert rig.b.lane.moved_in(packet(rig, item)) == Moved(5, item.token, item.cell, 1, LIVE)
    assert rig.b.lane.moved_in(bytes(16) + packet(rig, item)[16:]) is None
    assert rig.b.lane.moved_in(rig.board.secret + b"\xc1") is None


# --- the end


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


def test_outlets_are_readable_when_there_is_something(rig: Rig) -> None:
    tickets, shelf = rig.a.lane.outlets
    assert readable([tickets, shelf], 0) == []
    rig.b.wait(0, 5)
    assert readable([tickets, shelf], 0) == [tickets]
    rig.b.lane.next_ticket()
    rig.b.lane.give(rig.connection())
    assert readable([tickets, shelf], 0) == [shelf]

"""The lane between two processes' ends of it: tickets, who is given what, the shelf."""

from __future__ import annotations

import _socket
import os

import pytest

from sharedpool.descriptors import passing
from sharedpool.descriptors.owned import Owned
from sharedpool.descriptors.readable import readable
from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import Lane, MovingConnection, Ticket
from sharedpool.wire.board import CELLS, PLACES, SHELF
from sharedpool.wire.desk import Moved
from tests.unit.lane_driver import LIVE, Process, Rig, fill, rig

__all__ = ["rig"]  # pytest finds it here

pytestmark = pytest.mark.skipif(not lanes.SUPPORTED, reason="no lane on this platform")


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


def test_outlets_are_readable_when_there_is_something(rig: Rig) -> None:
    tickets, shelf = rig.a.lane.outlets
    assert readable([tickets, shelf], 0) == []
    rig.b.wait(0, 5)
    assert readable([tickets, shelf], 0) == [tickets]
    rig.b.lane.next_ticket()
    rig.b.lane.give(rig.connection())
    assert readable([tickets, shelf], 0) == [shelf]

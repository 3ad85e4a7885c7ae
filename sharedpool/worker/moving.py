"""A thread in the lane: it waits for a connection that another process gives, past the broker."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sharedpool.errors import PoolClosed
from sharedpool.owned import Owned
from sharedpool.wire.desk import Moved
from sharedpool.worker.lease import Lease, Ticket
from sharedpool.worker.seats import Seat

if TYPE_CHECKING:
    from sharedpool.worker.holdings import Holdings

# Whoever was to serve a ticket may have died with it, or be stopped: another one is written after so long.
_AGAIN_S = 0.5


def wait(holdings: Holdings, ticket: Ticket, deadline: float) -> Lease | None:
    """Wait in the lane for as long as connections move past the broker, at most until `deadline`.

    Return a lease that lay idle here after all. Else the ticket tells; if it is not settled the broker is to be asked.
    """
    seats = holdings.seats
    if seats is None or not seats.lane.board.moving or (seat := seats.take(ticket.owner)) is None:
        return None
    try:
        ticket.wake = seat.ring
        with holdings.lock:
            if holdings.disposed:
                raise PoolClosed(f"pool {holdings.config.name!r} is disposed")
            if (lease := holdings.cache.take(ticket.since)) is not None:
                return lease
            holdings.ensure_link()
            holdings.cache.tickets.want(ticket, max(0.001, deadline - ticket.since), in_lane=True)
            # Laid there without the lock meanwhile.
            if holdings.cache.idle and (lease := holdings.cache.take(ticket.since)) is not None:
                holdings.cache.give_up(ticket, ticket.since)
                return lease
        _wait_at(seat, holdings, ticket, deadline)
    finally:
        seats.put(seat)
    return None


def _wait_at(seat: Seat, holdings: Holdings, ticket: Ticket, deadline: float) -> None:
    board = seat.board
    again_at = float("-inf")
    if (got := seat.look_at_shelf()) is not None:  # as long as there is something, nobody need wait
        take_in(holdings, got, deadline - ticket.since, ticket)
    while not ticket.settled:
        now = time.monotonic()
        if now >= deadline or not (board.moving and seat.is_open) or not ticket.in_lane:
            with holdings.lock:
                if ticket.settled or not holdings.cache.tickets.withdraw(ticket):
                    continue
            holdings.signal()  # which looks whether something still comes here
            return
        if now >= again_at:
            again_at = now + _AGAIN_S
            seat.enter(ticket.request)
            # What was put there between the last look and the ticket's coming nobody will bring.
            if (got := seat.look_at_shelf()) is not None:
                take_in(holdings, got, deadline - now, ticket)
                continue
        if (got := seat.wait(min(deadline, again_at) - now)) is not None:
            take_in(holdings, got, deadline - now, ticket)


def take_in(holdings: Holdings, got: tuple[Moved, Owned], limit_s: float, mine: Ticket | None) -> None:
    """Take in a connection, for this thread or for whoever waits."""
    moved, sock = got
    other = holdings.receive(moved, sock, limit_s)
    if other is not None and other is not mine:
        other.wake()

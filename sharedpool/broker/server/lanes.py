"""The broker's ends of the pools' lanes (`sharedpool/lane/lane.py`), and the letting-in of workers.

While connections move past it the broker leaves queue and shelf alone. Else it wakes who waits in the lane, to ask the
broker, and takes over what comes to the shelf.
"""

from __future__ import annotations

import _socket
import logging
import os
import selectors
import time
from collections.abc import Callable

from sharedpool.broker.core.commands import CloseLane, Command, Halt, LetIn, OpenLane, PassOn, Proceed, Queue, ToLane
from sharedpool.broker.core.ledger import Ledger, Word
from sharedpool.broker.server.desk import Desk
from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import Item, Lane, Ticket
from sharedpool.wire import desk as wire
from sharedpool.wire.board import BROKERS_PLACE, BROKERS_REQUEST, SHELF

logger = logging.getLogger("sharedpool.broker")


class Lanes:
    """All lanes of one broker. `desk` is None where there can be no desk, and so no lane.

    `execute` carries out what the ledger decides, `later` has the ledger told once that is done.
    """

    def __init__(
        self,
        desk: Desk | None,
        ledger: Ledger,
        selector: selectors.BaseSelector,
        execute: Callable[[list[Command]], None],
        later: Callable[[Word], None],
    ) -> None:
        self._desk = desk
        self._ledger = ledger
        self._selector = selector
        self._execute = execute
        self._later = later
        self._network = lanes.network()
        self._lanes: dict[str, Lane] = {}
        self._handed: dict[str, list[int]] = {}  # descriptors, for the workers
        self._seats: dict[str, _socket.socket] = {}
        self._watched: dict[str, list[int]] = {}
        self._lines: dict[bytes, int] = {}  # to the desk, by program
        self._waiting: dict[bytes, LetIn] = {}  # to be let in, once they are at the desk; by session

    # --- workers

    def stays(self, program: bytes, line: int) -> None:
        """Take in that a program's line to the desk is there: its sessions can be let in."""
        self._lines[program] = line
        for session, order in list(self._waiting.items()):
            if session.startswith(program):
                self.let_in(order)

    def line_ended(self, line: int) -> None:
        """Take in that a line has ended."""
        for program in [program for program, number in self._lines.items() if number == line]:
            del self._lines[program]

    def forget(self, session: bytes) -> None:
        """Take in that a session is over."""
        self._waiting.pop(session, None)

    def let_in(self, order: LetIn) -> None:
        """Hand a lane to a session; later, if its process has not come to the desk yet."""
        self._waiting.pop(order.session, None)
        fds = self._handed.get(order.pool)
        line = next((line for program, line in self._lines.items() if order.session.startswith(program)), None)
        if line is None:
            self._waiting[order.session] = order
        elif fds is not None and self._desk is not None:
            self._desk.hand(line, wire.LetIn(order.session, order.number, order.index, self._network), fds)

    # --- lanes

    def open(self, order: OpenLane) -> None:
        """Make a lane."""
        if self._desk is None or not lanes.SUPPORTED:
            return
        fds: list[int] = []
        lane: Lane | None = None
        try:
            fds = lanes.make()
            lane = Lane([os.dup(fd) for fd in fds], SHELF)
            seat = lane.seat(BROKERS_PLACE)
        except OSError as error:
            if lane is not None:
                lane.close()
            for fd in fds:
                os.close(fd)
            logger.warning("pool %r: no lane (%s): its connections are closed and opened instead", order.pool, error)
            return
        self._close(order.pool)
        self._lanes[order.pool], self._handed[order.pool], self._seats[order.pool] = lane, fds, seat
        self._selector.register(seat, selectors.EVENT_READ, lambda: self._read(order.pool))
        self._watch(order.pool)
        self._later(lambda ledger, now: ledger.lane_opened(order.pool, order.serial, lane.board, now))

    def close_lane(self, order: CloseLane) -> None:
        """Let go of a lane."""
        self._close(order.pool)

    def proceed(self, order: Proceed) -> None:
        """Leave queue and shelf alone."""
        self._unwatch(order.pool)

    def halt(self, order: Halt) -> None:
        """Wake who waits, take over what lies on the shelf, and whatever comes later."""
        if order.pool in self._lanes:
            self._watch(order.pool)
            self._later(lambda ledger, now: self._empty(order.pool))

    def queue(self, order: Queue) -> None:
        """Join the queue of a lane, and look at its shelf: what lies there nobody would bring."""
        if (lane := self._lanes.get(order.pool)) is not None:
            for _ in range(order.times):
                lane.queue(Ticket(SHELF, BROKERS_PLACE, BROKERS_REQUEST))
            self._later(lambda ledger, now: self._take(order.pool, order.looks))

    def _take(self, pool: str, most: int) -> list[Command]:
        """Take what lies on a shelf, for those who wait at the broker."""
        commands: list[Command] = []
        lane = self._lanes.get(pool)
        while lane is not None and lane.board.moving and most > 0 and (taken := lane.take()) is not None:
            moved, sock = taken
            sock.close()  # it is in custody
            most -= 1
            commands += self._ledger.shelved(pool, moved, time.monotonic())
        return commands if most == 0 else commands + self._ledger.looked(pool, time.monotonic())

    def _read(self, pool: str) -> None:
        """Take what came to the broker's own seat."""
        lane, seat = self._lanes[pool], self._seats[pool]
        while (got := lane.receive(seat)) is not None:
            moved, sock = got
            sock.close()  # it is in custody
            self._execute(self._ledger.came(pool, moved, time.monotonic()))
            if pool not in self._lanes:
                return

    def pass_on(self, order: PassOn) -> None:
        """Send a connection to who waits at the broker, at his place in the lane."""
        lane, moved = self._lanes.get(order.pool), order.message
        fd = -1 if self._desk is None else self._desk.fileno_of(moved.token)
        if lane is None or fd < 0 or not lane.pass_on(order.number, order.place, moved, fd):
            self._later(lambda ledger, now: ledger.not_passed(moved, now))

    def to_lane(self, order: ToLane) -> None:
        """Give a connection that was given to the broker."""
        lane, fd = self._lanes.get(order.pool), -1 if self._desk is None else self._desk.fileno_of(order.token)
        if lane is None or fd < 0 or not lane.give(Item(order.token, order.cell, order.live, fd)):
            pool, token, live = order.pool, order.token, order.live
            self._later(lambda ledger, now: ledger.unplaced(pool, wire.Moved(0, token, order.cell, 0, live), now))

    def _empty(self, pool: str) -> list[Command]:
        """Take what is in a lane that is halted."""
        lane = self._lanes.get(pool)
        if lane is None or lane.board.moving:
            return []
        while (ticket := lane.next_ticket()) is not None:
            lane.ring(ticket)
        commands: list[Command] = []
        while (taken := lane.take()) is not None:
            moved, sock = taken
            sock.close()  # it is in custody
            commands += self._ledger.shelved(pool, moved, time.monotonic())
        return commands + self._ledger.looked(pool, time.monotonic())

    def _watch(self, pool: str) -> None:
        if pool not in self._watched:
            self._watched[pool] = self._lanes[pool].outlets
            for fd in self._watched[pool]:
                self._selector.register(fd, selectors.EVENT_READ, lambda: self._execute(self._empty(pool)))

    def _unwatch(self, pool: str) -> None:
        for fd in self._watched.pop(pool, []):
            self._selector.unregister(fd)

    def _close(self, pool: str) -> None:
        self._unwatch(pool)
        if (lane := self._lanes.pop(pool, None)) is not None:
            self._selector.unregister(self._seats[pool])
            self._seats.pop(pool).close()
            lane.close()
            for fd in self._handed.pop(pool):
                os.close(fd)

    def close(self) -> None:
        """Let go of all lanes. They go on without the broker."""
        for pool in list(self._lanes):
            self._close(pool)

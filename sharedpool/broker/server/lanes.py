"""The broker's ends of the pools' lanes (`sharedpool/lane/lane.py`).

While connections move past the broker it leaves queue and shelf alone. Otherwise it watches both:
it wakes the waiting threads, so that they ask the broker, and takes over what is on the shelf.
"""

from __future__ import annotations

import _socket
import logging
import os
import selectors
import time
from collections.abc import Callable

from sharedpool.broker.core.commands import (
    CloseLane,
    Command,
    GiveInLane,
    HaltMoves,
    InviteToLane,
    JoinQueue,
    OpenLane,
    PassOn,
    StartMoves,
)
from sharedpool.broker.core.ledger import Ledger, LedgerCall
from sharedpool.broker.server.desk import Desk
from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import Lane, MovingConnection, Ticket
from sharedpool.wire import desk as wire
from sharedpool.wire.board import BROKER_PLACE, BROKER_REQUEST, SHELF

logger = logging.getLogger("sharedpool.broker")


class Lanes:
    """All lanes of one broker. `desk` is None where there can be no desk, and so no lane.

    `execute` carries out the ledger's commands. `call_later(call)` queues a call of the ledger for
    the loop's next turn.
    """

    def __init__(
        self,
        desk: Desk | None,
        ledger: Ledger,
        selector: selectors.BaseSelector,
        execute: Callable[[list[Command]], None],
        call_later: Callable[[LedgerCall], None],
    ) -> None:
        self._desk = desk
        self._ledger = ledger
        self._selector = selector
        self._execute = execute
        self._call_later = call_later
        self._network = lanes.network_namespace_id()
        self._lanes: dict[str, Lane] = {}
        self._handed: dict[str, list[int]] = {}  # the descriptors that workers are sent
        self._wait_sockets: dict[str, _socket.socket] = {}
        self._watched: dict[str, list[int]] = {}
        self._lines: dict[bytes, int] = {}  # lines to the desk, by program
        # Invitations that wait for their program's line to the desk, by session.
        self._waiting: dict[bytes, InviteToLane] = {}

    # --- workers

    def line_identified(self, program: bytes, line: int) -> None:
        """Let a program's sessions in: its line to the desk is known."""
        self._lines[program] = line
        for session, command in list(self._waiting.items()):
            if session.startswith(program):
                self.invite(command)

    def line_closed(self, line: int) -> None:
        """Forget a closed line."""
        for program in [program for program, number in self._lines.items() if number == line]:
            del self._lines[program]

    def session_ended(self, session: bytes) -> None:
        """Forget the invitation of a session that has ended."""
        self._waiting.pop(session, None)

    def invite(self, command: InviteToLane) -> None:
        """Send a session its lane's descriptors, once its program has a line to the desk."""
        self._waiting.pop(command.session, None)
        fds, session = self._handed.get(command.pool), command.session
        lines = [line for program, line in self._lines.items() if session.startswith(program)]
        if not lines:
            self._waiting[session] = command
        elif fds is not None and self._desk is not None:
            invitation = wire.LaneInvitation(
                session, command.member_number, command.index, self._network
            )
            self._desk.send_descriptors(lines[0], invitation, fds)

    # --- lanes

    def open(self, command: OpenLane) -> None:
        """Make a lane, and report it to the ledger."""
        if self._desk is None or not lanes.SUPPORTED:
            return
        fds: list[int] = []
        lane: Lane | None = None
        try:
            fds = lanes.make()
            lane = Lane([os.dup(fd) for fd in fds], SHELF)
            wait_socket = lane.wait_socket(BROKER_PLACE)
        except OSError as error:
            if lane is not None:
                lane.close()
            for fd in fds:
                os.close(fd)
            text = "pool %r: no lane (%s): connections are closed and opened instead of handed over"
            logger.warning(text, command.pool, error)
            return
        pool, serial, board = command.pool, command.serial, lane.board
        self._close(pool)
        self._lanes[pool], self._handed[pool], self._wait_sockets[pool] = lane, fds, wait_socket
        self._selector.register(wait_socket, selectors.EVENT_READ, lambda: self._read(pool))
        self._watch(pool)
        self._call_later(lambda ledger, now: ledger.lanes.opened(pool, serial, board, now))

    def close_lane(self, command: CloseLane) -> None:
        """Close a lane."""
        self._close(command.pool)

    def start_moves(self, command: StartMoves) -> None:
        """Leave queue and shelf to the workers."""
        self._unwatch(command.pool)

    def halt_moves(self, command: HaltMoves) -> None:
        """Wake the waiting threads, and take over what is on the shelf, or comes there later."""
        if command.pool in self._lanes:
            self._watch(command.pool)
            self._call_later(lambda ledger, now: self._empty(command.pool))

    def join_queue(self, command: JoinQueue) -> None:
        """Add the broker's tickets to a lane's queue, then look at its shelf.

        A connection that is on the shelf already would not be brought to a new ticket.
        """
        if (lane := self._lanes.get(command.pool)) is not None:
            for _ in range(command.times):
                lane.add_ticket(Ticket(SHELF, BROKER_PLACE, BROKER_REQUEST))
            self._call_later(lambda ledger, now: self._take(command.pool, command.most_from_shelf))

    def _take(self, pool: str, most: int) -> list[Command]:
        """Take up to `most` connections from a shelf, for the requests that wait at the broker."""
        commands: list[Command] = []
        lane = self._lanes.get(pool)
        while lane is not None and lane.board.moving and most > 0:
            if (taken := lane.take_from_shelf()) is None:
                break
            moved, sock = taken
            sock.close()  # the broker has a duplicate in custody
            most -= 1
            commands += self._ledger.lanes.found_on_shelf(pool, moved, time.monotonic())
        if most:
            commands += self._ledger.lanes.shelf_empty(pool, time.monotonic())
        return commands

    def _read(self, pool: str) -> None:
        """Take the connections that came to the broker's own wait socket."""
        lane, wait_socket = self._lanes[pool], self._wait_sockets[pool]
        while (got := lane.receive(wait_socket)) is not None:
            moved, sock = got
            sock.close()  # the broker has a duplicate in custody
            self._execute(self._ledger.lanes.received(pool, moved, time.monotonic()))
            if pool not in self._lanes:
                return

    def pass_on(self, command: PassOn) -> None:
        """Send a connection to a waiter of the broker, at its place in the lane."""
        lane, moved = self._lanes.get(command.pool), command.message
        fd = -1 if self._desk is None else self._desk.fileno_of(moved.token)
        if (
            lane is None
            or fd < 0
            or not lane.pass_on(command.member_number, command.place, moved, fd)
        ):
            self._call_later(lambda ledger, now: ledger.lanes.not_delivered(moved, now))

    def give(self, command: GiveInLane) -> None:
        """Give a connection of the broker's to the lane: to the first ticket, or to the shelf."""
        pool, token, cell, live = command.pool, command.token, command.cell, command.live
        lane = self._lanes.get(pool)
        fd = -1 if self._desk is None else self._desk.fileno_of(token)
        if lane is None or fd < 0 or not lane.give(MovingConnection(token, cell, live, fd)):
            moved = wire.Moved(0, token, cell, 0, live)
            self._call_later(lambda ledger, now: ledger.lanes.full(pool, moved, now))

    def _empty(self, pool: str) -> list[Command]:
        """Wake all tickets of a halted lane, and take everything from its shelf."""
        lane = self._lanes.get(pool)
        if lane is None or lane.board.moving:
            return []
        while (ticket := lane.next_ticket()) is not None:
            lane.wake(ticket)
        commands: list[Command] = []
        while (taken := lane.take_from_shelf()) is not None:
            moved, sock = taken
            sock.close()  # the broker has a duplicate in custody
            commands += self._ledger.lanes.found_on_shelf(pool, moved, time.monotonic())
        return commands + self._ledger.lanes.shelf_empty(pool, time.monotonic())

    def _watch(self, pool: str) -> None:
        if pool not in self._watched:
            self._watched[pool] = self._lanes[pool].outlets
            for fd in self._watched[pool]:
                self._selector.register(
                    fd, selectors.EVENT_READ, lambda: self._execute(self._empty(pool))
                )

    def _unwatch(self, pool: str) -> None:
        for fd in self._watched.pop(pool, []):
            self._selector.unregister(fd)

    def _close(self, pool: str) -> None:
        self._unwatch(pool)
        if (lane := self._lanes.pop(pool, None)) is not None:
            self._selector.unregister(self._wait_sockets[pool])
            self._wait_sockets.pop(pool).close()
            lane.close()
            for fd in self._handed.pop(pool):
                os.close(fd)

    def close(self) -> None:
        """Close the broker's ends of all lanes. The lanes go on without it."""
        for pool in list(self._lanes):
            self._close(pool)

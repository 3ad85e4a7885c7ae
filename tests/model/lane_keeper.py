"""The lanes of a broker's pools: what `lanes.py` does around the ledger."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from sharedpool.broker.core.commands import Command, GiveInLane, InviteToLane
from sharedpool.wire import desk
from sharedpool.wire.board import BROKER_PLACE, SHELF
from sharedpool.wire.desk import Moved
from sharedpool.wire.values import Token
from tests.model.control import ControlConnection
from tests.model.lane import End, Grip, Lane, MovingConnection
from tests.model.lane_threads import run
from tests.model.network import Packet
from tests.model.server import Proc

if TYPE_CHECKING:
    from tests.model.world import World


class LaneKeeper(ControlConnection):
    """The part of a broker that is in its pools' lanes."""

    custody: dict[Token, Proc]

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.lanes: dict[str, End] = {}
        self.wait_sockets: dict[str, deque[Packet | None]] = {}
        self.leaves_alone: set[str] = set()  # lanes in which connections move
        self.desk_lines: dict[bytes, int] = {}  # the sessions' lines to the desk
        self.invited: dict[bytes, InviteToLane] = {}  # who has not come to the desk yet
        self.grip = Grip(b"broker")

    def _open_lane(self, pool: str, serial: int) -> None:
        self._close_lane(pool)
        lane = Lane(pool, self.ledger.epoch)
        self.world.lanes.append(lane)
        self.lanes[pool] = End(lane, SHELF, b"broker")
        self.wait_sockets[pool] = lane.bind(SHELF, BROKER_PLACE)
        self.calls.append(lambda ledger, now: ledger.lanes.opened(pool, serial, lane.board, now))

    def _let_in(self, order: InviteToLane) -> None:
        self.invited.pop(order.session, None)
        number = self.desk_lines.get(order.session)
        wire = next((wire for wire in self.world.network.wires if wire.number == number), None)
        if wire is None:
            self.invited[order.session] = order
        elif (end := self.lanes.get(order.pool)) is not None:
            wire.answer(
                desk.LaneInvitation(order.session, order.member_number, order.index, "here"),
                lane=end.lane,
            )

    def _to_lane(self, order: GiveInLane) -> None:
        end, proc = self.lanes.get(order.pool), self.custody.get(order.token)
        if (
            end is None
            or proc is None
            or not run(end.give(MovingConnection(order.token, order.cell, order.live, proc)))
        ):
            moved = Moved(0, order.token, order.cell, 0, order.live)
            self.calls.append(lambda ledger, now: ledger.lanes.full(order.pool, moved, now))

    def _empty_later(self, pool: str) -> None:
        if pool in self.lanes:
            self.calls.append(lambda ledger, now: self._empty(pool))

    def _take_later(self, pool: str, most: int) -> None:
        self.calls.append(lambda ledger, now: self._take_from_shelf(pool, most))

    def _take_from_shelf(self, pool: str, most: int) -> list[Command]:
        commands: list[Command] = []
        end = self.lanes.get(pool)
        while (
            end is not None
            and end.board.moving
            and most > 0
            and (taken := run(end.take(self.grip))) is not None
        ):
            moved, proc = taken
            proc.holders.discard(self.grip)
            most -= 1
            commands += self.ledger.lanes.found_on_shelf(pool, moved, self.world.now)
        return (
            commands
            if most == 0
            else commands + self.ledger.lanes.shelf_empty(pool, self.world.now)
        )

    def _empty(self, pool: str) -> list[Command]:
        end = self.lanes.get(pool)
        if end is None or end.board.moving:
            return []
        while (ticket := end.next_ticket()) is not None:
            end.wake(ticket)
        commands: list[Command] = []
        while (taken := run(end.take(self.grip))) is not None:
            moved, proc = taken
            proc.holders.discard(self.grip)
            commands += self.ledger.lanes.found_on_shelf(pool, moved, self.world.now)
        return commands + self.ledger.lanes.shelf_empty(pool, self.world.now)

    def _close_lane(self, pool: str) -> None:
        self.leaves_alone.discard(pool)
        if (end := self.lanes.pop(pool, None)) is not None:
            del self.wait_sockets[pool]
            end.close()

    @property
    def lanes_to_read(self) -> list[str]:
        """Where `read_lane` has something to do."""
        return [
            pool
            for pool, end in self.lanes.items()
            if self.wait_sockets[pool]
            or (pool not in self.leaves_alone and (end.lane.queue or end.lane.shelf))
        ]

    def read_lane(self, pool: str) -> None:
        end, wait_socket = self.lanes[pool], self.wait_sockets[pool]
        while wait_socket:
            got = end.receive(wait_socket, self.grip)
            if got is None:
                continue
            moved, proc = got
            proc.holders.discard(self.grip)
            self.execute(self.ledger.lanes.received(pool, moved, self.world.now))
            if self.world.broker is not self or pool not in self.lanes:
                return
        if pool not in self.leaves_alone:
            self.execute(self._empty(pool))

    def execute(self, commands: list[Command]) -> None:
        raise NotImplementedError

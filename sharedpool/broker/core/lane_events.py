"""What happens in the lanes: connections that come to the broker there, and those it cannot send.

A lane (`sharedpool/lane`) is how connections of one pool move between workers. The broker takes
part in it for the waiters that asked the broker, and empties its *shelf* when connections stop
moving.
"""

from __future__ import annotations

from collections.abc import Callable

from sharedpool.broker.core.commands import Command
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.moves import Moves
from sharedpool.wire.board import Board
from sharedpool.wire.desk import Moved


class LaneEvents:
    """Handles the lanes' events; `settle(now)` schedules, and returns what is to be done."""

    def __init__(
        self,
        context: Context,
        handover: Handover,
        moves: Moves,
        settle: Callable[[float], list[Command]],
    ) -> None:
        self._slots = context.slots
        self._handover = handover
        self._moves = moves
        self._settle = settle

    def opened(self, pool_name: str, serial: int, board: Board, now: float) -> list[Command]:
        """Handle that a pool's lane was made, by the order of this number."""
        self._moves.opened(pool_name, serial, board, now)
        return self._settle(now)

    def joined(self, session_id: bytes, now: float, *, takes_part: bool = True) -> list[Command]:
        """Handle that a session uses its pool's lane, or will not."""
        if (session := self._slots.sessions.get(session_id)) is not None:
            self._moves.joined(session, takes_part=takes_part)
        return self._settle(now)

    def found_on_shelf(self, pool_name: str, moved: Moved, now: float) -> list[Command]:
        """Handle a connection that the broker took from a lane's shelf."""
        self._moves.transit.sync(now)
        pool = self._slots.pools.get(pool_name)
        if pool is not None and (lease := self._moves.found_on_shelf(pool, moved)) is not None:
            self._handover.found_on_shelf(lease, moved.live, now)
        return self._settle(now)

    def shelf_empty(self, pool_name: str, now: float) -> list[Command]:
        """Handle that nothing was left on a lane's shelf."""
        self._moves.transit.sync(now)
        if (pool := self._slots.pools.get(pool_name)) is not None:
            self._moves.shelf_empty(pool, now)
        return self._settle(now)

    def received(self, pool_name: str, moved: Moved, now: float) -> list[Command]:
        """Handle a connection that a worker sent to the broker, for one of its waiters."""
        if (pool := self._slots.pools.get(pool_name)) is not None:
            self._moves.received(pool)
        return self.found_on_shelf(pool_name, moved, now)

    def not_delivered(self, moved: Moved, now: float) -> list[Command]:
        """Handle that a connection could not be sent to its waiter."""
        self._moves.transit.sync(now)
        self._handover.not_delivered(moved, now)
        return self._settle(now)

    def full(self, pool_name: str, moved: Moved, now: float) -> list[Command]:
        """Handle that a lane has no room for a connection that the broker was to give there."""
        self._moves.transit.sync(now)
        pool = self._slots.pools.get(pool_name)
        if pool is not None and (lease := self._moves.found_on_shelf(pool, moved)) is not None:
            self._handover.park(lease, moved.live, now)
        return self._settle(now)

"""A pool's membership of the lane, in one process: enter, wait and give there, leave.

The broker invites a process by the desk, with the lane's descriptors. All of it runs in the link's
thread, but for `give` and `take`, which checkouts and checkins call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from msgspec import structs

from sharedpool.descriptors.available import require
from sharedpool.descriptors.owned import Owned
from sharedpool.descriptors.timer import Timer
from sharedpool.errors import SharedPoolError
from sharedpool.lane.lane import DESCRIPTORS, FOR_A_LANE, Lane, network_namespace_id
from sharedpool.lane.wait_sockets import WaitSocket, WaitSockets
from sharedpool.wire.desk import LaneInvitation, Moved
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.local_state import LocalState
from sharedpool.worker.logs import logger


class LaneMover(Protocol):
    """The fast way to give and take connections in the pool's lane (`mover.py`)."""

    def give(self, lease: Lease, conn: PooledConnection, now: float) -> bool:
        """Give a connection that was checked in; return False if it must take the slow path."""

    def take(self, wait_s: float, began: float) -> PooledConnection | None:
        """Wait for a connection and check it out; return None if the slow path must be taken."""

    def note_kept_in_vain(self) -> None:
        """Record that a kept connection was not asked for again."""

    def check_kept_later(self) -> None:
        """Have the link's thread look at the kept connections a moment later."""


MakeMover = Callable[[WaitSockets, Lane, Timer | None], LaneMover]


class LaneMembership:
    """One process's membership of its pool's lane.

    `receive` handles a connection that arrives for a thread that no longer waits.
    """

    def __init__(
        self, local: LocalState, receive: Callable[[Moved, Owned], None], make_mover: MakeMover
    ) -> None:
        self._local = local
        self._receive = receive
        self._make_mover = make_mover
        # An invitation, while the broker's WELCOME is on its way, and its descriptors.
        self.invitation: LaneInvitation | None = None
        self._invited_with: list[int] = []
        # None outside a lane.
        self.wait_sockets: WaitSockets | None = None
        self.mover: LaneMover | None = None
        # Of lanes that were left, where a thread may not have filed a connection that it received.
        self._left: list[WaitSocket] = []

    # --- checkouts and checkins

    def give(self, lease: Lease, conn: PooledConnection, now: float) -> bool:
        """Give a connection by the fast path: see `mover.py`."""
        mover = self.mover
        return mover is not None and mover.give(lease, conn, now)

    def take(self, timeout: float | None, began: float) -> PooledConnection | None:
        """Check out a connection by the fast path: see `mover.py`."""
        if (mover := self.mover) is None:
            return None
        return mover.take(self._local.config.timeout if timeout is None else timeout, began)

    # --- entering and leaving

    def keep_invitation(self, invitation: LaneInvitation | None, fds: list[int]) -> None:
        """Keep an invitation and its descriptors, in place of a former one."""
        former, self.invitation, self._invited_with = self._invited_with, invitation, fds
        for fd in former:
            os.close(fd)

    def enter(self) -> bool:
        """Accept the invitation; return False if this process cannot take part.

        From now on threads wait and give in the lane whenever connections move in it.
        """
        local, invitation = self._local, self.invitation
        assert invitation is not None
        fds, self._invited_with, self.invitation = self._invited_with, [], None
        if not self._can_enter(invitation, fds):
            for fd in fds:
                os.close(fd)
            return False
        try:
            lane = Lane(fds, invitation.member_number, local.refuse)
        except OSError as error:
            text = "pool %r: cannot enter the lane (%s): no connections are passed to this process"
            logger.info(text, local.config.name, error)
            return False
        self.leave()
        self.wait_sockets = WaitSockets(lane, invitation.index, self._receive)
        timer = None if local.link is None else local.link.make_timer()
        self.mover = self._make_mover(self.wait_sockets, lane, timer)
        local.cache.enter_lane(lane.board.moving_flag)
        with local.lock:
            waiting = list(local.cache.waiting.values())
        for waiter in waiting:
            waiter.wake()  # to take a wait socket
        return True

    def _can_enter(self, invitation: LaneInvitation, fds: list[int]) -> bool:
        local = self._local
        try:
            require(FOR_A_LANE, f"pool {local.config.name!r}: its lane")
        except SharedPoolError:
            return False
        return (
            local.hands_over
            and invitation.network == network_namespace_id()
            and len(fds) == DESCRIPTORS
        )

    def leave(self, *, to_new_broker: bool = False) -> None:
        """Leave the lane.

        `to_new_broker`: the lane's broker is gone. So take the connections on its shelf, and those
        that were sent to our wait sockets, because nobody else might.
        """
        cache = self._local.cache
        wait_sockets, self.wait_sockets, self.mover = self.wait_sockets, None, None
        cache.leave_lane()
        if wait_sockets is None:
            return
        with self._local.lock:
            cache.waiters.leave_lane()
        wait_sockets.lane.leaving = True
        while to_new_broker and (got := wait_sockets.lane.take_from_shelf()) is not None:
            self._receive_as_current(*got)
        wait_sockets.lane.close()
        for moved, sock in wait_sockets.drain() if to_new_broker else ():
            self._receive_as_current(moved, sock)
        wait_sockets.close()
        self._left += wait_sockets.in_hand

    def _receive_as_current(self, moved: Moved, sock: Owned) -> None:
        """Receive a connection from a former broker's lane.

        The new broker counts generations anew. So the connection gets the current generation, as
        all connections did that are held here.
        """
        live = structs.replace(moved.live, generation=self._local.cache.generation)
        self._receive(structs.replace(moved, live=live), sock)

    @property
    def unsure(self) -> bool:
        """Whether a thread may have received a connection that is not listed anywhere yet."""
        self._left = [wait_socket for wait_socket in self._left if wait_socket.in_hand]
        return bool(self._left) or (self.wait_sockets is not None and self.wait_sockets.busy)

    def disown(self) -> None:
        """Leave the parent's lane, in a forked child."""
        if self.wait_sockets is not None:
            self.wait_sockets.lane.close()
            self.wait_sockets.disown()
        self.keep_invitation(None, [])

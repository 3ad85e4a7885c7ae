"""A worker's part in its pool's lane, and its wait sockets: what `session.py`, `wait_sockets.py`
and the worker's `lane_membership.py` do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import structs

from sharedpool.errors import SharedPoolError
from sharedpool.wire.board import PLACES
from sharedpool.wire.desk import Joined, LaneInvitation, Moved
from sharedpool.wire.messages import CancelQuery, ReleaseReason
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.lease import Closing, Lease, Waiter
from sharedpool.worker.core.time_slice import STEADY_GAP_S
from tests.model.desk import AtTheDesk, Conn, Lack
from tests.model.lane import End, Got, Grip, Lane
from tests.model.lane_threads import Thread, WaitSocket, run
from tests.model.server import Proc

if TYPE_CHECKING:
    from tests.model.world import World

_LOOKS = 4  # `wait_sockets._CHECKS`


class LaneMembership(AtTheDesk):
    """The part of a worker that enters its pool's lane, looks at its wait sockets and leaves it."""

    world: World
    id: bytes
    cache: Cache
    messages: BrokerMessages
    waiters: list[Waiter]
    patience: dict[int, bool]
    users: list[Conn]
    connecting: list[Lease]
    quitting: list[Waiter]
    closing: list[tuple[Closing, Conn]]
    epoch: int

    def __init__(self, *, handover: bool, slice_s: float) -> None:
        super().__init__(handover=handover, slice_s=slice_s)
        self.end: End | None = None
        self.index = -1
        self.unused: list[int] = []  # places
        self.wait_sockets: list[WaitSocket] = []
        self.free_wait_sockets: list[WaitSocket] = []
        self.threads: list[Thread] = []
        self.timer_at = float("inf")
        self.stray = Grip(b"")
        self.unfit = 0  # so many that come next fail their reset
        self.most_wait_sockets = PLACES
        self.invitation: tuple[LaneInvitation, Lane, int] | None = None  # of which broker
        self.woken: list[Waiter] = []  # at their locks, to take a wait socket
        self.abandoned: list[Waiter] = []  # an interrupt has ended the clean-up too
        self.left_wait_sockets: list[
            tuple[WaitSocket, int]
        ] = []  # in the same way, and for how many beats more

    # --- the lane

    def read_home(self) -> None:
        """The link reads what came on the session's line: `Session.invited`."""
        assert self.desk is not None
        packet = self.desk.down.popleft()
        message, lane = packet.message, packet.lane
        assert isinstance(message, LaneInvitation)
        assert isinstance(lane, Lane)
        self.invitation = message, lane, self.epoch
        if self.established:
            self.accept()

    def accept(self) -> None:
        """`Session._accept`, `LaneMembership.enter`."""
        invitation, self.invitation = self.invitation, None
        if invitation is None or not self.hands_over or invitation[2] != self.epoch:
            return
        message, lane, _ = invitation
        assert self.desk is not None
        self.leave_lane()
        # A former end here may still have wait sockets at its addresses: its number is another.
        self.end = End(lane, message.member_number, self.id, self._refuse, self._is_short)
        self.index = message.index
        self.unused = [
            message.index * PLACES + wait_socket
            for wait_socket in range(self.most_wait_sockets - 1, -1, -1)
        ]
        self.cache.enter_lane(lane.board.moving_flag)
        self.woken = [waiter for waiter in self.waiters if self._waits_at_lock(waiter)]
        self.desk.say(Joined(self.id))
        self.flush()

    def _waits_at_lock(self, waiter: Waiter) -> bool:
        waits = waiter.request in self.cache.waiting and not self.waits_in_lane(waiter)
        return waits and waiter not in self.quitting and waiter not in self.abandoned

    def _refuse(self, moved: Moved) -> None:
        self.messages.refuse(moved, self.world.now)
        self.flush()

    def _is_short(self) -> bool:
        if self.lacks is not Lack.SOCKET:
            return False
        self.lacks = Lack.NOTHING
        return True

    def leave_lane(self, *, former_brokers: bool = False) -> None:
        end, self.end = self.end, None
        self.cache.leave_lane()
        if end is None:
            return
        wait_sockets, self.wait_sockets, self.free_wait_sockets, self.unused = (
            self.wait_sockets,
            [],
            [],
            [],
        )
        while (
            former_brokers
            and (got := run(end.take(self.stray)) or self._read(wait_sockets)) is not None
        ):
            live = structs.replace(got[0].live, generation=self.cache.generation)
            self._take_stray((structs.replace(got[0], live=live), got[1]))
        for wait_socket in wait_sockets:
            wait_socket.wake()
        end.close()

    def _read(self, wait_sockets: list[WaitSocket]) -> Got | None:
        return next(
            (
                got
                for wait_socket in wait_sockets
                if (got := wait_socket.read(self.stray)) is not None
            ),
            None,
        )

    def wake_at_wait_socket(self, waiter: Waiter) -> None:
        for thread in self.threads:
            if thread.waiter is waiter:
                thread.wait_socket.wake()

    def waits_in_lane(self, waiter: Waiter) -> bool:
        return any(thread.waiter is waiter for thread in self.threads)

    # --- wait sockets

    def _take_wait_socket(self) -> WaitSocket | None:
        if self.free_wait_sockets:
            wait_socket = self.free_wait_sockets.pop()
            wait_socket.looks = -1
            return wait_socket
        if self.end is None or not self.unused:
            return None
        if self.lacks is Lack.WAIT_SOCKET:
            self.lacks = Lack.NOTHING
            return None
        place = self.unused.pop()
        wait_socket = WaitSocket(self.end, place, self.end.lane.bind(self.end.member_number, place))
        self.wait_sockets.append(wait_socket)
        return wait_socket

    def _put_wait_socket(self, wait_socket: WaitSocket) -> None:
        wait_socket.end.board.leave_place(wait_socket.place)
        if wait_socket in self.wait_sockets:  # else of a lane that was left
            if not wait_socket.settled:
                wait_socket.looks = 0
            self.free_wait_sockets.append(wait_socket)

    @property
    def wait_socket_news(self) -> bool:
        """Whether the link sees that something came to a wait socket where nobody waits."""
        return any(
            wait_socket.looks >= 0 and wait_socket.box for wait_socket in self.free_wait_sockets
        )

    def look_in_lane(self) -> None:
        """`Session.receive_strays`."""
        if self.end is None:
            self.note_arrivals()
            return
        for wait_socket in list(self.free_wait_sockets):
            if wait_socket.looks < 0:
                continue
            if (got := wait_socket.read(self.stray)) is not None:
                self._take_stray(got)
            elif wait_socket.looks < _LOOKS:
                wait_socket.looks += 1
            else:
                wait_socket.looks, wait_socket.settled = -1, True
        self.note_arrivals()
        self.give_kept()

    def note_arrivals(self) -> None:
        if self.end is not None:
            self.cache.reporter.unread = [
                moved
                for wait_socket in self.wait_sockets
                if (moved := wait_socket.peek()) is not None
            ]
        # Also from a lane that was left since.
        in_hand = {holder for proc in self.world.server.procs for holder in proc.holders}
        self.cache.reporter.unsure = any(thread.grip in in_hand for thread in self.threads)

    def beat_in_lane(self) -> None:
        """`WaitSockets.check_all`, and a look."""
        for wait_socket in list(self.free_wait_sockets):
            if (got := wait_socket.read(self.stray)) is not None:
                self._take_stray(got)
        left, self.left_wait_sockets = self.left_wait_sockets, []
        for wait_socket, beats in left:
            if beats:
                self.left_wait_sockets.append((wait_socket, beats - 1))
            else:
                wait_socket.settled = False
                self._put_wait_socket(wait_socket)
        self.look_in_lane()
        self.find_abandoned()

    def find_abandoned(self) -> None:
        """`Session._find_abandoned`, and what `Session.beat` does with a lease that came later.

        No thread goes on with that lease: it is closed. A real process waits for another beat.
        """
        abandoned, self.abandoned = self.abandoned, []
        for waiter in [waiter for waiter in abandoned if waiter in self.waiters]:
            self.waiters.remove(waiter)
            lease, waiter.lease = waiter.lease, None
            if self.cache.waiters.withdraw(waiter) or lease is None:
                continue
            if lease.conn is None:
                self.cache.closed(lease, ReleaseReason.CLOSED, gone=lease.ref is None)
            elif self.cache.leases.get(lease.token) is lease:
                reason = ReleaseReason.CLOSED
                self._to_close([self.cache.close(lease, lease.conn, reason, self.world.now)])
        self.flush()

    def give_kept(self) -> None:
        now = self.world.now
        for lease in list(self.cache.idle) if self.cache.moving_flag[0] else ():
            if now - lease.since >= STEADY_GAP_S:
                self._settle(lease)
            else:
                self.timer_at = min(self.timer_at, now + STEADY_GAP_S)

    def _settle(self, lease: Lease) -> None:
        outcome = self.cache.reconsider_idle(lease, self.world.now)
        if isinstance(outcome, Closing):
            self._to_close([outcome])
        else:
            self.wake(outcome)
        self.flush()

    def _take_stray(self, got: Got) -> None:
        waiter = self._receive(got, self.stray)
        if waiter is not None:
            self.wake(waiter)
        elif (lease := self.cache.leases.get(got[0].token)) is not None and self.cache.moving_flag[
            0
        ]:
            self._settle(lease)
        self.flush()

    # --- receiving

    def _own(self, proc: Proc, grip: Grip) -> Conn:
        """Put a socket into a connection of this process's: from now on it can be
        written to here."""
        proc.holders.discard(grip)
        proc.holders.add(self.id)
        self.adopted += 1
        return Conn(proc, movable=True)

    def _is_fit(self, proc: Proc) -> bool:
        """Whether the reset's answer is as it should be."""
        if self.unfit:
            self.unfit -= 1
            return False
        return not (proc.dead or proc.cut)

    def _receive(self, got: Got, grip: Grip) -> Waiter | None:
        """`Receiver.receive`."""
        moved, proc = got
        lacks, self.lacks = self.lacks, Lack.NOTHING
        self.cache.arriving.pop(moved.token, None)
        if self.broken_shells or lacks is Lack.SHELL or not self._is_fit(proc):
            proc.holders.discard(grip)
            self._refuse(moved)
            if self.broken_shells:
                self.handover = self.hands_over = False
            return None
        if moved.passed is not None and moved.passed.trial:
            self.cache.outbox.append(CancelQuery(moved.token, trial=True))
        conn = self._own(proc, grip)
        left = moved.live.left_ms
        retire_at = float("inf") if left is None else self.world.now + left / 1000
        try:
            return self.messages.received(moved, conn, retire_at, self.world.now)
        except SharedPoolError:
            proc.holders.discard(self.id)
            proc.cut = True
            self._refuse(moved)
            return None

    def _to_close(self, closing: list[Closing]) -> None:
        raise NotImplementedError

    def wake(self, waiter: Waiter | None) -> None:
        raise NotImplementedError

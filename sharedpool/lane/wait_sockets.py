"""Where threads wait in the lane: each at a socket of its own, to which a connection is sent
(`sharedpool/lane/lane.py`).
"""

from __future__ import annotations

import contextlib
import select
import socket
import weakref
from collections import deque
from collections.abc import Callable, Iterator

from sharedpool.descriptors.available import FOR_A_CONNECTION, require
from sharedpool.descriptors.owned import Owned, close_if_ours, identity, is_still
from sharedpool.descriptors.wakeup import WaitLock
from sharedpool.errors import SharedPoolError
from sharedpool.lane.lane import Lane, Ticket
from sharedpool.wire.board import PLACES
from sharedpool.wire.desk import PACKET_BYTES, Moved

# Takes in what was sent to a wait socket that nobody waits at any more.
Receive = Callable[[Moved, Owned], None]
# Whoever was to serve a ticket may have died with it, or be stopped: another one is written after so long, then after
# twice the time: the queue has room for some thousands. And who waits looks so often whether connections still move.
AGAIN_S, _AGAIN_LIMIT_S = 0.5, 2.0
# A free wait socket is looked at so often before it is taken for settled.
_CHECKS = 4
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


class WaitSocket:
    """One thread's place to wait. Raise OSError when it cannot be had.

    It is `is_quiet` while nothing more can come to it: every ticket that was written for it has been answered. `busy`:
    its thread may have received what is listed nowhere yet, until it says that it is not.
    """

    def __init__(self, lane: Lane, place: int) -> None:
        self._lane = lane
        self.board = lane.board
        self._place = place
        self._request = 0
        self._once = True  # there is one ticket for it
        self._again_s = AGAIN_S
        self._address = lane.address(lane.number, place)
        self.is_quiet, self.busy = True, False
        self.owner: weakref.ref[object] | None = None  # as its ticket's; None while it is free
        self._sock = lane.wait_socket(place)
        self._known = (identity(self._sock.fileno()),)
        self._poller = select.poll()
        self._poller.register(self._sock, select.POLLIN)

    @property
    def number(self) -> int:
        """Where it is in the lane."""
        return self._place

    @property
    def in_hand(self) -> bool:
        """Whether its thread may have received what is listed nowhere yet: not if it was interrupted."""
        return self.busy and self.owner is not None and self.owner() is not None

    def fileno(self) -> int:
        """Return the descriptor, which becomes readable when something came; -1 when closed."""
        return self._sock.fileno()

    @property
    def is_open(self) -> bool:
        """Whether this process is in the lane still. A former broker's goes on saying that connections move."""
        return self._lane.open

    def join_queue(self, request: int) -> float:
        """Join the queue, or join it once more; return after how many seconds to do so again.

        Afterwards look at the shelf.
        """
        again = self._request == request
        self._again_s = min(2 * self._again_s, _AGAIN_LIMIT_S) if again else AGAIN_S
        self._request, self.is_quiet = request, False
        self.board.take_place(self._place, request)
        self._once = not again
        self._lane.add_ticket(Ticket(self._lane.number, self._place, request & 0xFFFFFFFF))
        return self._again_s

    def leave_queue(self) -> None:
        """Leave the queue."""
        self.board.leave_place(self._place)

    def wake(self) -> None:
        """Wake who waits here. From any thread; too late is no harm."""
        try:
            if is_still(self._sock.fileno(), self._known):
                self._sock.sendto(b"", self._address)
        except OSError:
            pass  # full: awake already; closed meanwhile: over

    def wait(self, timeout_s: float) -> tuple[Moved, Owned] | None:
        """Block until something comes, `wake` is called or `timeout_s` seconds are over. Return what has come."""
        self._poller.poll(max(0.0, timeout_s) * 1000)
        self.busy = True  # before it is read
        got = self.read()
        self.busy = got is not None
        return got

    def read(self) -> tuple[Moved, Owned] | None:
        """Read what has come, if anything has. Once the lane is left that is the link's to read, by `drain`."""
        return self.drain() if self._lane.open else None

    def drain(self) -> tuple[Moved, Owned] | None:
        """Read what has come, if anything has, even after the lane was left."""
        if not is_still(self._sock.fileno(), self._known):
            return None
        got = self._lane.receive(self._sock)
        if got is not None and got[0].request == self._request:
            self.is_quiet = self._once
        return got

    def take_from_shelf(self) -> tuple[Moved, Owned] | None:
        """Take what lies on the shelf, if anything does."""
        self.busy = True  # before it is taken
        got = self._lane.take_from_shelf()
        self.busy = got is not None
        return got

    def peek(self) -> Moved | None:
        """Return what has come and was not read yet, and leave it there."""
        try:
            if not is_still(self._sock.fileno(), self._known):
                return None
            return self._lane.moved_in(self._sock.recv(PACKET_BYTES, _PEEK))
        except OSError:
            return None

    def close(self) -> None:
        """Leave for good."""
        close_if_ours(self._sock, self._known)


class WaitSockets:
    """One pool's wait sockets in this process. At a free one that is not settled something may still come: the link
    watches it for a while, and the next thread that takes it reads it.

    A wait socket's descriptor is closed by the thread that has it, never while that waits: Linux's `poll` looks the
    number up again when it is woken, and by then it may be another file's, of which the thread would wait for ever. And
    the link reads free wait sockets only. When it finds that one was taken meanwhile it rings it: what it read may have
    been the ring by which that thread was to wake.

    There are `PLACES` at most. When all are taken the threads queue for one, each at a `WaitLock`: a wait socket that
    is put back is the first one's, and a thread that asks meanwhile goes to the end.
    """

    def __init__(self, lane: Lane, index: int, receive: Receive) -> None:
        self.lane = lane
        self._receive = receive
        self._places = [
            index * PLACES + wait_socket for wait_socket in range(PLACES - 1, -1, -1)
        ]  # not taken yet
        self._free: list[WaitSocket] = []
        self._all: set[WaitSocket] = set()
        self._not_quiet: dict[
            WaitSocket, int
        ] = {}  # free ones, and how often they were looked at in vain
        self._suspected: set[WaitSocket] = set()
        self._queue: deque[weakref.ref[WaitLock]] = deque()
        self._closed = False

    def take(
        self, owner: weakref.ref[object] | None, wait_lock: WaitLock | None = None
    ) -> WaitSocket | None:
        """Return a wait socket for a thread, whose call `owner` refers to; None when there is none, or others wait for
        one.

        `wait_lock`: where the thread waits, if it has queued for a wait socket.
        """
        if self._queue and self._first_in_queue() is not wait_lock:
            return None
        wait_socket = self._take(owner)
        if wait_socket is not None and self._queue and wait_lock is not None:
            self.step_out(wait_lock)
        return wait_socket

    def _take(self, owner: weakref.ref[object] | None) -> WaitSocket | None:
        try:
            wait_socket = self._free.pop()
            self._not_quiet.pop(wait_socket, None)
        except IndexError:
            try:
                require(1 + FOR_A_CONNECTION, "a seat in the lane")
                wait_socket = WaitSocket(self.lane, self._places.pop())
            except (OSError, SharedPoolError, IndexError):
                return None
            wait_socket.owner = owner
            self._all.add(wait_socket)
            return wait_socket
        wait_socket.owner = owner
        return wait_socket

    def give_back(self, wait_socket: WaitSocket) -> None:
        """Give a wait socket back, whatever may still come there."""
        wait_socket.leave_queue()
        wait_socket.owner, wait_socket.busy = None, False
        if not wait_socket.is_quiet:
            self._not_quiet[wait_socket] = 0
        self._free.append(wait_socket)
        if self._closed:
            self._close_free()
        elif self._queue:
            self._call_first()

    @property
    def can_be_had(self) -> bool:
        """Whether a wait socket comes back some time. Without descriptors there may be none at all."""
        return bool(self._all)

    def line_up(self, wait_lock: WaitLock) -> None:
        """Queue for a wait socket. Afterwards try to take one: it may have come back meanwhile. Then wait at the
        gate.
        """
        self._queue.append(weakref.ref(wait_lock))

    def step_out(self, wait_lock: WaitLock) -> None:
        """Leave the queue for a wait socket."""
        with contextlib.suppress(ValueError):  # it is not in it
            self._queue.remove(weakref.ref(wait_lock))
        self._call_first()  # more than one wait socket may have come back, or this thread was called and does not come

    def _call_first(self) -> None:
        if (self._free or self._places) and (first := self._first_in_queue()) is not None:
            first.wake()

    def _first_in_queue(self) -> WaitLock | None:
        """Return the gate of the first thread that waits for a wait socket. One that was interrupted may have left
        nothing.
        """
        while True:
            try:
                ref = self._queue[0]
            except IndexError:
                return None
            if (wait_lock := ref()) is not None:
                return wait_lock
            with contextlib.suppress(ValueError):  # another thread was faster
                self._queue.remove(ref)

    def unread(self) -> list[Moved]:
        """Return what has come and nobody has read yet."""
        return [
            moved for wait_socket in list(self._all) if (moved := wait_socket.peek()) is not None
        ]

    @property
    def busy(self) -> bool:
        """Whether a thread may have received what is listed nowhere yet. To be asked after `unread`."""
        return bool(self.in_hand)

    @property
    def in_hand(self) -> list[WaitSocket]:
        """The sockets from which a thread may have received that, also once the lane is left."""
        return [wait_socket for wait_socket in list(self._all) if wait_socket.in_hand]

    def receive_strays(self) -> None:
        """Take in what came for those who wait no more."""
        for wait_socket, times in list(self._not_quiet.items()):
            if (got := wait_socket.read()) is not None:
                self._receive(*got)
            self._ring_if_taken(wait_socket)
            if got is not None:
                continue
            if times < _CHECKS:
                self._not_quiet[wait_socket] = times + 1
            elif self._not_quiet.pop(wait_socket, None) is not None:
                wait_socket.is_quiet = True

    def drain(self) -> Iterator[tuple[Moved, Owned]]:
        """Read what has come anywhere, before all wait sockets are left."""
        for wait_socket in list(self._all):
            while (got := wait_socket.drain()) is not None:
                yield got

    def check_all(self) -> None:
        """Look everywhere: a giver may have been stopped for long, a waiting thread interrupted."""
        for wait_socket in list(self._free):
            if (got := wait_socket.read()) is not None:
                self._receive(*got)
            self._ring_if_taken(wait_socket)
        self._reclaim_abandoned()

    def _ring_if_taken(self, wait_socket: WaitSocket) -> None:
        if wait_socket not in self._free:
            wait_socket.wake()

    def _reclaim_abandoned(self) -> None:
        """Take back wait sockets that nobody is at and that were not given back: their threads were interrupted.

        Each must look so at two calls: a thread may be taking or leaving it.
        """
        out = self._all - set(self._free)
        missing = {
            wait_socket
            for wait_socket in out
            if wait_socket.owner is None or wait_socket.owner() is None
        }
        found = missing & self._suspected
        self._suspected = missing - found
        for wait_socket in found:
            wait_socket.is_quiet = False
            self.give_back(wait_socket)

    @property
    def not_quiet(self) -> list[int]:
        """Descriptors of wait sockets where something may still come that nobody waits for."""
        return [
            wait_socket.fileno()
            for wait_socket in list(self._not_quiet)
            if wait_socket.fileno() >= 0
        ]

    def wake_all(self) -> None:
        """Wake all who wait."""
        for wait_socket in list(self._all):
            wait_socket.wake()

    def close(self) -> None:
        """Leave for good: close the free wait sockets, and wake the threads at the others, which close theirs by
        `give_back`.
        """
        self._closed = True
        self._close_free()
        self.wake_all()

    def _close_free(self) -> None:
        """Close the free wait sockets. Several threads may do so at once: each pops its own."""
        while True:
            try:
                wait_socket = self._free.pop()
            except IndexError:
                return
            self._not_quiet.pop(wait_socket, None)
            self._all.discard(wait_socket)
            wait_socket.close()

    def disown(self) -> None:
        """In a forked child: let go of all the parent's. The threads that are at them are not here."""
        for wait_socket in list(self._all):
            wait_socket.close()
        self._free.clear()
        self._not_quiet.clear()

"""Wait sockets: where threads wait in the lane, each at a socket of its own (`lane.py`).

Another process, or the broker, sends a connection to such a socket's address.
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

# Receives a connection at a wait socket that no thread waits at any more.
Receive = Callable[[Moved, Owned], None]
# A process that was to serve a ticket may have died with it, or be stopped. So a waiter writes
# another one after the first time, and then after twice the time: the queue has room for some
# thousands. In the meantime it looks as often as that whether connections still move.
AGAIN_S, _AGAIN_LIMIT_S = 0.5, 2.0
_CHECKS = 4  # of a free wait socket, before it counts as quiet
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


class WaitSocket:
    """One thread's place to wait. Raise OSError if it cannot be made."""

    def __init__(self, lane: Lane, place: int) -> None:
        self._lane = lane
        self.board = lane.board
        self.place = place  # in the lane
        self._request = 0
        self._once = True  # one ticket was written for this request
        self._again_s = AGAIN_S
        self._address = lane.address(lane.member_number, place)
        # Nothing more can arrive here: every ticket that was written for it was answered.
        self.is_quiet = True
        # The thread may have received a connection that is not listed anywhere yet.
        self.busy = False
        # The checkout that has it. None while it is free.
        self.owner: weakref.ref[object] | None = None
        self._sock = lane.wait_socket(place)
        self._known = (identity(self._sock.fileno()),)
        self._poller = select.poll()
        self._poller.register(self._sock, select.POLLIN)

    @property
    def in_hand(self) -> bool:
        """Whether its thread may have received a connection that is not listed anywhere yet.

        A thread that was interrupted has none.
        """
        return self.busy and self.owner is not None and self.owner() is not None

    def fileno(self) -> int:
        """Return the descriptor, readable after an arrival or a wake-up; -1 once closed."""
        return self._sock.fileno()

    @property
    def is_open(self) -> bool:
        """Whether this process is still in the lane.

        The board of a lane that was left goes on saying that connections move.
        """
        return self._lane.open

    def join_queue(self, request: int) -> float:
        """Join the queue, or write another ticket; return the seconds until the next one.

        Look at the shelf afterwards.
        """
        again = self._request == request
        self._again_s = min(2 * self._again_s, _AGAIN_LIMIT_S) if again else AGAIN_S
        self._request, self.is_quiet = request, False
        self.board.take_place(self.place, request)
        self._once = not again
        self._lane.add_ticket(Ticket(self._lane.member_number, self.place, request & 0xFFFFFFFF))
        return self._again_s

    def leave_queue(self) -> None:
        """Leave the queue."""
        self.board.leave_place(self.place)

    def wake(self) -> None:
        """Wake the thread that waits here. May be called by any thread, and too late."""
        try:
            if is_still(self._sock.fileno(), self._known):
                self._sock.sendto(b"", self._address)
        except OSError:
            pass  # full: it wakes anyway; closed: it does not wait any more

    def wait(self, timeout_s: float) -> tuple[Moved, Owned] | None:
        """Block until a connection arrives (returned), `wake` is called or the time is over."""
        self._poller.poll(max(0.0, timeout_s) * 1000)
        self.busy = True  # before the read
        got = self.read()
        self.busy = got is not None
        return got

    def read(self) -> tuple[Moved, Owned] | None:
        """Receive a connection, if one has arrived.

        Once the lane is left, the link's thread receives, with `drain`.
        """
        return self.drain() if self._lane.open else None

    def drain(self) -> tuple[Moved, Owned] | None:
        """Receive a connection, if one has arrived, even after the lane was left."""
        if not is_still(self._sock.fileno(), self._known):
            return None
        got = self._lane.receive(self._sock)
        if got is not None and got[0].request == self._request:
            self.is_quiet = self._once
        return got

    def take_from_shelf(self) -> tuple[Moved, Owned] | None:
        """Take the oldest connection from the shelf, if there is one."""
        self.busy = True  # before it is taken
        got = self._lane.take_from_shelf()
        self.busy = got is not None
        return got

    def peek(self) -> Moved | None:
        """Return the message of a connection that has arrived, and leave it there."""
        try:
            if not is_still(self._sock.fileno(), self._known):
                return None
            return self._lane.moved_in(self._sock.recv(PACKET_BYTES, _PEEK))
        except OSError:
            return None

    def close(self) -> None:
        """Close the socket."""
        close_if_ours(self._sock, self._known)


class WaitSockets:
    """One pool's wait sockets in this process, at most `PLACES`.

    1. A thread takes a wait socket and gives it back. If all are taken, threads queue for one,
       each at a `WaitLock`. A wait socket that is given back is for the first of them.
    2. At a free wait socket that is not quiet, a connection may still arrive. The link's thread
       watches it for a while. So does the next thread that takes it.
    3. The link's thread reads free wait sockets only. If it finds afterwards that one was taken
       meanwhile, it wakes it: it may have read that thread's wake-up.
    4. A wait socket is closed by the thread that has it, never while that thread waits. Linux's
       `poll` looks the number up again when it wakes, and then it may be another file's.
    """

    def __init__(self, lane: Lane, index: int, receive: Receive) -> None:
        self.lane = lane
        self._receive = receive
        # Places without a wait socket yet, the lowest last.
        self._places = [index * PLACES + offset for offset in range(PLACES - 1, -1, -1)]
        self._free: list[WaitSocket] = []
        self._all: set[WaitSocket] = set()
        # Free wait sockets that are not quiet, and how often they were checked in vain.
        self._not_quiet: dict[WaitSocket, int] = {}
        self._suspected: set[WaitSocket] = set()  # looked abandoned at the last check
        self._queue: deque[weakref.ref[WaitLock]] = deque()
        self._closed = False

    def take(
        self, owner: weakref.ref[object] | None, wait_lock: WaitLock | None = None
    ) -> WaitSocket | None:
        """Return a wait socket; None if none is free, or if others have queued for one before.

        `owner` refers to the thread's checkout. `wait_lock` is where the thread waits, if it has
        queued.
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
                require(1 + FOR_A_CONNECTION, "a wait socket in the lane")
                wait_socket = WaitSocket(self.lane, self._places.pop())
            except (OSError, SharedPoolError, IndexError):
                return None
            wait_socket.owner = owner
            self._all.add(wait_socket)
            return wait_socket
        wait_socket.owner = owner
        return wait_socket

    def give_back(self, wait_socket: WaitSocket) -> None:
        """Give a wait socket back, whatever may still arrive there."""
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
        """Whether there is a wait socket to queue for: without descriptors there is none."""
        return bool(self._all)

    def line_up(self, wait_lock: WaitLock) -> None:
        """Queue for a wait socket.

        Try to take one afterwards: it may have been given back meanwhile. Then wait at the lock.
        """
        self._queue.append(weakref.ref(wait_lock))

    def step_out(self, wait_lock: WaitLock) -> None:
        """Leave the queue for a wait socket."""
        with contextlib.suppress(ValueError):  # not in the queue
            self._queue.remove(weakref.ref(wait_lock))
        # Several wait sockets may be free. Or this thread was called, and does not take the one.
        self._call_first()

    def _call_first(self) -> None:
        if (self._free or self._places) and (first := self._first_in_queue()) is not None:
            first.wake()

    def _first_in_queue(self) -> WaitLock | None:
        """Return the lock of the first thread in the queue; drop those of interrupted threads."""
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
        """Return the messages of connections that have arrived and are unread."""
        return [
            moved for wait_socket in list(self._all) if (moved := wait_socket.peek()) is not None
        ]

    @property
    def busy(self) -> bool:
        """Whether a thread may have received a connection that is not listed anywhere yet.

        Call this after `unread`.
        """
        return bool(self.in_hand)

    @property
    def in_hand(self) -> list[WaitSocket]:
        """The sockets whose threads may have such a connection, also once the lane is left."""
        return [wait_socket for wait_socket in list(self._all) if wait_socket.in_hand]

    def receive_strays(self) -> None:
        """Receive late connections at the free wait sockets that are not quiet."""
        for wait_socket, times in list(self._not_quiet.items()):
            if (got := wait_socket.read()) is not None:
                self._receive(*got)
            self._wake_if_taken(wait_socket)
            if got is not None:
                continue
            if times < _CHECKS:
                self._not_quiet[wait_socket] = times + 1
            elif self._not_quiet.pop(wait_socket, None) is not None:
                wait_socket.is_quiet = True

    def drain(self) -> Iterator[tuple[Moved, Owned]]:
        """Receive connections at all wait sockets, before they are closed."""
        for wait_socket in list(self._all):
            while (got := wait_socket.drain()) is not None:
                yield got

    def check_all(self) -> None:
        """Receive at all free wait sockets, and take back abandoned ones.

        A giver may have been stopped for long, a waiting thread interrupted.
        """
        for wait_socket in list(self._free):
            if (got := wait_socket.read()) is not None:
                self._receive(*got)
            self._wake_if_taken(wait_socket)
        self._reclaim_abandoned()

    def _wake_if_taken(self, wait_socket: WaitSocket) -> None:
        if wait_socket not in self._free:
            wait_socket.wake()

    def _reclaim_abandoned(self) -> None:
        """Take back the wait sockets of interrupted threads.

        A wait socket counts as abandoned if it was not free and had no owner at two checks in a
        row: at one alone a thread may be taking it or giving it back.
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
        """Descriptors of free wait sockets where a connection may still arrive."""
        return [
            wait_socket.fileno()
            for wait_socket in list(self._not_quiet)
            if wait_socket.fileno() >= 0
        ]

    def wake_all(self) -> None:
        """Wake all waiting threads."""
        for wait_socket in list(self._all):
            wait_socket.wake()

    def close(self) -> None:
        """Close the free wait sockets, and wake the threads at the others.

        Those threads close theirs in `give_back`.
        """
        self._closed = True
        self._close_free()
        self.wake_all()

    def _close_free(self) -> None:
        """Close the free wait sockets. Several threads may do so at once: each pops others."""
        while True:
            try:
                wait_socket = self._free.pop()
            except IndexError:
                return
            self._not_quiet.pop(wait_socket, None)
            self._all.discard(wait_socket)
            wait_socket.close()

    def disown(self) -> None:
        """Close all wait sockets in a forked child, where their threads do not exist."""
        for wait_socket in list(self._all):
            wait_socket.close()
        self._free.clear()
        self._not_quiet.clear()

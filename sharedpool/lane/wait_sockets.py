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

from sharedpool.descriptors.available import FOR_A_CONNECTION, make_sure_of
from sharedpool.descriptors.owned import Owned, identity, is_still, let_go
from sharedpool.descriptors.wakeup import Gate
from sharedpool.errors import SharedPoolError
from sharedpool.lane.lane import Lane
from sharedpool.lane.lane import Ticket as Place
from sharedpool.wire.board import SEATS
from sharedpool.wire.desk import PACKET_BYTES, Moved

# Takes in what was sent to a seat that nobody waits at any more.
Receive = Callable[[Moved, Owned], None]
# Whoever was to serve a ticket may have died with it, or be stopped: another one is written after so long, then after
# twice the time: the queue has room for some thousands. And who waits looks so often whether connections still move.
AGAIN_S, _AGAIN_LIMIT_S = 0.5, 2.0
# A free seat is looked at so often before it is taken for settled.
_LOOKS = 4
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


class Seat:
    """One thread's place to wait. Raise OSError when it cannot be had.

    It is `settled` while nothing more can come to it: every ticket that was written for it has been answered. `busy`:
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
        self.settled, self.busy = True, False
        self.owner: weakref.ref[object] | None = None  # as its ticket's; None while it is free
        self._sock = lane.seat(place)
        self._known = (identity(self._sock.fileno()),)
        self._poller = select.poll()
        self._poller.register(self._sock, select.POLLIN)

    @property
    def number(self) -> int:
        """Where it is in the lane."""
        return self._place

    def fileno(self) -> int:
        """Return the descriptor, which becomes readable when something came; -1 when closed."""
        return self._sock.fileno()

    @property
    def is_open(self) -> bool:
        """Whether this process is in the lane still. A former broker's goes on saying that connections move."""
        return self._lane.open

    def enter(self, request: int) -> float:
        """Join the queue, or join it once more; return after how many seconds to do so again.

        Afterwards look at the shelf.
        """
        again = self._request == request
        self._again_s = min(2 * self._again_s, _AGAIN_LIMIT_S) if again else AGAIN_S
        self._request, self.settled = request, False
        self.board.take_place(self._place, request)
        self._once = not again
        self._lane.queue(Place(self._lane.number, self._place, request & 0xFFFFFFFF))
        return self._again_s

    def leave(self) -> None:
        """Leave the queue."""
        self.board.leave_place(self._place)

    def ring(self) -> None:
        """Wake who waits here. From any thread; too late is no harm."""
        try:
            if is_still(self._sock.fileno(), self._known):
                self._sock.sendto(b"", self._address)
        except OSError:
            pass  # full: awake already; closed meanwhile: over

    def wait(self, timeout_s: float) -> tuple[Moved, Owned] | None:
        """Block until something comes, `ring` is called or `timeout_s` seconds are over. Return what has come."""
        self._poller.poll(max(0.0, timeout_s) * 1000)
        self.busy = True  # before it is read
        got = self.read()
        self.busy = got is not None
        return got

    def read(self) -> tuple[Moved, Owned] | None:
        """Read what has come, if anything has. Once the lane is left that is the link's to read, by `rest`."""
        return self.rest() if self._lane.open else None

    def rest(self) -> tuple[Moved, Owned] | None:
        """Read what has come, if anything has, even after the lane was left."""
        if not is_still(self._sock.fileno(), self._known):
            return None
        got = self._lane.receive(self._sock)
        if got is not None and got[0].request == self._request:
            self.settled = self._once
        return got

    def look_at_shelf(self) -> tuple[Moved, Owned] | None:
        """Take what lies on the shelf, if anything does."""
        self.busy = True  # before it is taken
        got = self._lane.take()
        self.busy = got is not None
        return got

    def peek(self) -> Moved | None:
        """Return what has come and was not read yet, and leave it there."""
        try:
            if not is_still(self._sock.fileno(), self._known):
                return None
            return self._lane.is_moved(self._sock.recv(PACKET_BYTES, _PEEK))
        except OSError:
            return None

    def close(self) -> None:
        """Leave for good."""
        let_go(self._sock, self._known)


class Seats:
    """One pool's seats in this process. At a free one that is not settled something may still come: the link watches it
    for a while, and the next thread that takes it reads it.

    A seat's descriptor is closed by the thread that has it, never while that waits: Linux's `poll` looks the number up
    again when it is woken, and by then it may be another file's, of which the thread would wait for ever. And the link
    reads free seats only. When it finds that one was taken meanwhile it rings it: what it read may have been the ring
    by which that thread was to wake.

    There are `SEATS` at most. When all are taken the threads queue for one, each at a `Gate`: a seat that is put back
    is the first one's, and a thread that asks meanwhile goes to the end.
    """

    def __init__(self, lane: Lane, index: int, receive: Receive) -> None:
        self.lane = lane
        self._receive = receive
        self._places = [index * SEATS + seat for seat in range(SEATS - 1, -1, -1)]  # not taken yet
        self._free: list[Seat] = []
        self._all: set[Seat] = set()
        self._unsettled: dict[Seat, int] = {}  # free ones, and how often they were looked at in vain
        self._suspected: set[Seat] = set()
        self._queue: deque[weakref.ref[Gate]] = deque()
        self._closed = False

    def take(self, owner: weakref.ref[object] | None, gate: Gate | None = None) -> Seat | None:
        """Return a seat for a thread, whose call `owner` refers to; None when there is none, or others wait for one.

        `gate`: where the thread waits, if it has queued for a seat.
        """
        if self._queue and self._first_in_queue() is not gate:
            return None
        seat = self._take(owner)
        if seat is not None and self._queue and gate is not None:
            self.step_out(gate)
        return seat

    def _take(self, owner: weakref.ref[object] | None) -> Seat | None:
        try:
            seat = self._free.pop()
            self._unsettled.pop(seat, None)
        except IndexError:
            try:
                make_sure_of(1 + FOR_A_CONNECTION, "a seat in the lane")
                seat = Seat(self.lane, self._places.pop())
            except (OSError, SharedPoolError, IndexError):
                return None
            seat.owner = owner
            self._all.add(seat)
            return seat
        seat.owner = owner
        return seat

    def put(self, seat: Seat) -> None:
        """Give a seat back, whatever may still come there."""
        seat.leave()
        seat.owner, seat.busy = None, False
        if not seat.settled:
            self._unsettled[seat] = 0
        self._free.append(seat)
        if self._closed:
            self._close_free()
        elif self._queue:
            self._call_first()

    @property
    def can_be_had(self) -> bool:
        """Whether a seat comes back some time. Without descriptors there may be none at all."""
        return bool(self._all)

    def line_up(self, gate: Gate) -> None:
        """Queue for a seat. Afterwards try to take one: it may have come back meanwhile. Then wait at the gate."""
        self._queue.append(weakref.ref(gate))

    def step_out(self, gate: Gate) -> None:
        """Leave the queue for a seat."""
        with contextlib.suppress(ValueError):  # it is not in it
            self._queue.remove(weakref.ref(gate))
        self._call_first()  # more than one seat may have come back, or this thread was called and does not come

    def _call_first(self) -> None:
        if (self._free or self._places) and (first := self._first_in_queue()) is not None:
            first.ring()

    def _first_in_queue(self) -> Gate | None:
        """Return the gate of the first thread that waits for a seat. One that was interrupted may have left nothing."""
        while True:
            try:
                ref = self._queue[0]
            except IndexError:
                return None
            if (gate := ref()) is not None:
                return gate
            with contextlib.suppress(ValueError):  # another thread was faster
                self._queue.remove(ref)

    def arriving(self) -> list[Moved]:
        """Return what has come and nobody has read yet."""
        return [moved for seat in list(self._all) if (moved := seat.peek()) is not None]

    @property
    def busy(self) -> bool:
        """Whether a thread may have received what is listed nowhere yet. To be asked after `arriving`.

        Also once they are left. Whose thread was interrupted has nothing.
        """
        return any(seat.busy and seat.owner is not None and seat.owner() is not None for seat in list(self._all))

    def look(self) -> None:
        """Take in what came for those who wait no more."""
        for seat, times in list(self._unsettled.items()):
            if (got := seat.read()) is not None:
                self._receive(*got)
            self._ring_if_taken(seat)
            if got is not None:
                continue
            if times < _LOOKS:
                self._unsettled[seat] = times + 1
            elif self._unsettled.pop(seat, None) is not None:
                seat.settled = True

    def rest(self) -> Iterator[tuple[Moved, Owned]]:
        """Read what has come anywhere, before all seats are left."""
        for seat in list(self._all):
            while (got := seat.rest()) is not None:
                yield got

    def beat(self) -> None:
        """Look everywhere: a giver may have been stopped for long, a waiting thread interrupted."""
        for seat in list(self._free):
            if (got := seat.read()) is not None:
                self._receive(*got)
            self._ring_if_taken(seat)
        self._take_strays()

    def _ring_if_taken(self, seat: Seat) -> None:
        if seat not in self._free:
            seat.ring()

    def _take_strays(self) -> None:
        """Take back seats that nobody is at and that were not given back: their threads were interrupted.

        Each must look so at two calls: a thread may be taking or leaving it.
        """
        out = self._all - set(self._free)
        missing = {seat for seat in out if seat.owner is None or seat.owner() is None}
        found = missing & self._suspected
        self._suspected = missing - found
        for seat in found:
            seat.settled = False
            self.put(seat)

    @property
    def unsettled(self) -> list[int]:
        """Descriptors of seats where something may still come that nobody waits for."""
        return [seat.fileno() for seat in list(self._unsettled) if seat.fileno() >= 0]

    def ring(self) -> None:
        """Wake all who wait."""
        for seat in list(self._all):
            seat.ring()

    def close(self) -> None:
        """Leave for good: close the free seats, and wake the threads at the others, which close theirs by `put`."""
        self._closed = True
        self._close_free()
        self.ring()

    def _close_free(self) -> None:
        """Close the free seats. Several threads may do so at once: each pops its own."""
        while True:
            try:
                seat = self._free.pop()
            except IndexError:
                return
            self._unsettled.pop(seat, None)
            self._all.discard(seat)
            seat.close()

    def disown(self) -> None:
        """In a forked child: let go of all the parent's. The threads that are at them are not here."""
        for seat in list(self._all):
            seat.close()
        self._free.clear()
        self._unsettled.clear()

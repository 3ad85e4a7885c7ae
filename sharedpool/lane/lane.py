"""The lane: by which connections move between the processes of one pool on one host, past the broker as a rule.

It is made by the broker, one for each pool in which connections are passed on, and reaches the workers as descriptors
at the desk: nobody else gets in. It has a *board* (`wire/board.py`), a queue of *tickets* (a pipe: the kernel keeps
their order), a *shelf* for connections that nobody waits for (a pair of SEQPACKET sockets, the longest there first),
and *wait sockets*, the sockets of the threads that wait (datagrams, each at an address of its own).

What the broker passes on itself it sends to the wait socket of the thread that waits, by the place that its request
names. Past the broker it goes so: who waits writes his turn on the board, then a ticket, and looks at the shelf once
more; who gives takes the first ticket whose turn is still the same, writes its holder on the board and sends the
connection to that wait socket; without one he puts it on the shelf, and looks for tickets once more. So of two who miss
each other the later one sees the other.

    turn, ticket, look at the shelf  ──►  wait at the wait socket
    ticket, board, send to the wait socket       or    board, shelf, look for a ticket

Nothing here blocks. A process that dies or stops between two steps costs a connection at most (`broker/core/moves.py`),
or a ticket: who waits writes another one after a while.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from io import FileIO
from typing import NamedTuple

from msgspec import structs

from sharedpool.descriptors import passing
from sharedpool.descriptors.owned import Owned, identity, is_still
from sharedpool.errors import ProtocolError
from sharedpool.wire.board import BOARD_BYTES, SECRET_BYTES, SHELF, Board
from sharedpool.wire.codec import decode_moved, encode
from sharedpool.wire.desk import PACKET_BYTES, Live, Moved
from sharedpool.wire.values import Token

_TICKET = struct.Struct("=III")
_INT_BYTES = struct.calcsize("i")
SUPPORTED = hasattr(os, "memfd_create") and hasattr(socket, "SOCK_SEQPACKET")
_MAP_FIXED = 0x10
_MMAP = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
DESCRIPTORS = 5  # of a lane, as they reach a worker
FOR_A_LANE = (
    DESCRIPTORS + 1
)  # and a timer; the board's is closed once it is mapped, and there is one to send with


class Ticket(NamedTuple):
    """Who waits: the number of his session in the lane, his place on the board, his request."""

    number: int
    place: int
    request: int


class Item(NamedTuple):
    """A connection that moves: its lease's name and cell, what its next worker must know of it, and its socket."""

    token: Token
    cell: int
    live: Live
    fd: int


def network() -> str:
    """Return a name of this process's network namespace, in which the wait sockets' addresses are; "" where there is
    none.
    """
    try:
        status = os.stat("/proc/self/ns/net")
    except OSError:
        return ""
    return f"{status.st_dev}-{status.st_ino}"


class Lane:
    """One process's end of a lane: descriptors of the board's memory, of the queue's and the shelf's both ends.

    They are this object's from now on, and closed if this raises OSError. `number` is this process's own as a holder
    (the broker's is `SHELF`). `refuse` is told of a connection that came and is of no use here: its socket is closed,
    or no descriptor was free for it.
    """

    def __init__(
        self, fds: Sequence[int], number: int, refuse: Callable[[Moved], None] = lambda _: None
    ) -> None:
        self.number = number
        self._refuse = refuse
        memory, write_end, read_end, put_end, take_end = fds
        owners: list[_socket.socket] = []
        try:
            self.board = Board(memoryview(_mapped(memory)))
            self._secret = self.board.secret
            self._name = hashlib.sha256(self._secret).hexdigest()[
                :16
            ]  # other users see the wait sockets' addresses
            self._known = {fd: (identity(fd),) for fd in fds[1:]}
            # Objects, not numbers: one that another thread has closed is known to be so.
            self._writer, self._reader = (
                FileIO(write_end, "wb", closefd=False),
                FileIO(read_end, "rb", closefd=False),
            )
            owners += [_socket.socket(fileno=put_end)]
            owners += [_socket.socket(fileno=take_end)]
            self._put, self._take = owners
            self._sender = _socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._known[self._sender.fileno()] = (identity(self._sender.fileno()),)
        except BaseException:
            for owner in owners:
                owner.detach()
            for fd in fds[1:]:
                with contextlib.suppress(OSError):
                    os.close(fd)
            raise
        finally:
            os.close(memory)
        self.open = True
        self.leaving = False  # what is given from now on nobody would take

    def address(self, number: int, place: int) -> str:
        """Return the address of a session's wait socket: there is no file."""
        return f"\0sharedpool-{self._name}-{number}-{place}"

    def wait_socket(self, place: int) -> _socket.socket:
        """Return a socket at the address of a place of this process's: no greenlet waits in it. Raise OSError."""
        sock = _socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind(self.address(self.number, place))
        except BaseException:
            sock.close()
            raise
        return sock

    @property
    def outlets(self) -> list[int]:
        """The descriptors that are readable when there is a ticket, or something on the shelf."""
        return [self._reader.fileno(), self._take.fileno()]

    # --- tickets

    def add_ticket(self, ticket: Ticket) -> bool:
        """Put a ticket at the end of the queue; return whether there was room for it."""
        try:
            if not self._is_still_ours(self._writer.fileno()):
                return False
            self.board.count_request()
            return self._writer.write(_TICKET.pack(*ticket)) == _TICKET.size
        except (OSError, ValueError):  # nobody reads; closed meanwhile
            return False

    def _is_queued(self) -> bool:
        """Say whether there is a ticket in the queue, stale ones included."""
        try:
            fd = self._reader.fileno()
            return self._is_still_ours(fd) and any(
                fcntl.ioctl(fd, termios.FIONREAD, bytes(_INT_BYTES))
            )
        except (OSError, ValueError):  # closed meanwhile
            return False

    def next_ticket(self) -> Ticket | None:
        """Take the first ticket out of the queue whose thread still waits."""
        try:
            while self._is_still_ours(self._reader.fileno()):
                packet = self._reader.read(_TICKET.size)
                if packet is None or len(packet) < _TICKET.size:
                    return None
                ticket = Ticket._make(_TICKET.unpack(packet))
                if self.board.is_waiting_at(ticket.place, ticket.request):
                    return ticket
        except (OSError, ValueError):  # closed meanwhile
            pass
        return None

    # --- giving

    def give(self, item: Item) -> bool:
        """Give a connection to the first who waits, or put it on the shelf; return whether that was done.

        The reset was sent, and the connection's object has left it. What was not given is this process's still; else
        it is nobody's here, whatever becomes of the caller's descriptor.
        """
        if self._deliver(item):
            return True
        if not self._shelve(item):
            return False
        while self._is_queued():  # somebody has come meanwhile
            taken = self.take_from_shelf()
            if taken is None:
                break  # somebody else was faster: perhaps he himself. His place in the queue is his still
            moved, sock = taken
            other = Item(moved.token, moved.cell, moved.live, sock.fileno())
            if not self._deliver(other) and not self._shelve(other):
                sock.shutdown(socket.SHUT_RDWR)  # no room any more: it ends, and its slot is free
            sock.close()
        return True

    def _deliver(self, item: Item) -> bool:
        ticket = self.next_ticket()
        while ticket is not None:
            if self._send(
                item, ticket.request, ticket.number, self.address(ticket.number, ticket.place)
            ):
                return True
            ticket = self.next_ticket()
        return False

    def _shelve(self, item: Item) -> bool:
        return self._send(item, 0, SHELF, None)

    def _send(self, item: Item, request: int, holder: int, address: str | None) -> bool:
        sock = self._sender if address is not None else self._put
        if (
            self.leaving
            or not self._is_still_ours(sock.fileno())
            or not self.board.has(item.cell, item.token)
        ):
            return False
        moves = self.board.set_holder(item.cell, holder)  # before it is sent: see `wire/board.py`
        packet = self._secret + encode(Moved(request, item.token, item.cell, moves, item.live))
        try:
            if address is None:
                passing.send_with(sock, packet, item.fd)
            else:
                passing.send_with_to(sock, packet, item.fd, address)
        except OSError:  # that wait socket is gone, or full; the shelf is full
            self.board.set_holder(item.cell, self.number)
            return False
        return True

    def pass_on(self, number: int, place: int, moved: Moved, fd: int) -> bool:
        """Send a lease that is on no board to a place, by the broker; return whether that was done."""
        try:
            if self._is_still_ours(self._sender.fileno()):
                packet = self._secret + encode(moved)
                passing.send_with_to(self._sender, packet, fd, self.address(number, place))
                return True
        except OSError:  # that wait socket is gone, or full
            pass
        return False

    def wake(self, ticket: Ticket) -> None:
        """Wake who waits."""
        with contextlib.suppress(OSError):
            if self._is_still_ours(self._sender.fileno()):
                self._sender.sendto(b"", self.address(ticket.number, ticket.place))

    # --- taking

    def take_from_shelf(self) -> tuple[Moved, Owned] | None:
        """Take the connection that has lain on the shelf longest; None when there is none."""
        try:
            while self._is_still_ours(self._take.fileno()):
                if (got := self._next(self._take)) is not None:
                    moved, sock = got
                    return structs.replace(
                        moved, moves=self.board.set_holder(moved.cell, self.number)
                    ), sock
        except OSError:  # there is nothing
            pass
        return None

    def receive(self, sock: _socket.socket) -> tuple[Moved, Owned] | None:
        """Take in a packet, if there is one that is as it should be. What is on the board by its name is a lease's."""
        try:
            return self._next(sock)
        except OSError:
            return None

    def _next(self, sock: _socket.socket) -> tuple[Moved, Owned] | None:
        """Take in a packet; None for one that is not as it should be. Raise OSError where there is none."""
        packet, socks = passing.receive_sockets(sock, PACKET_BYTES)
        if (moved := self.moved_in(packet)) is not None:
            fits = (
                self.board.has(moved.cell, moved.token)
                and moved.live.generation == self.board.generation
            )
            if (fits or moved.passed is not None) and len(socks) == 1:
                return moved, socks.pop()
            self._refuse(moved)
        for each in socks:
            each.close()
        if not packet:
            raise ConnectionError("the other end is closed, or somebody rang")
        return None

    def moved_in(self, packet: bytes) -> Moved | None:
        """Return what a packet says that was only looked at."""
        if packet.startswith(self._secret):
            with contextlib.suppress(ProtocolError):
                return decode_moved(packet[SECRET_BYTES:])
        return None

    # --- the end

    def _is_still_ours(self, fd: int) -> bool:
        return self.open and is_still(fd, self._known.get(fd, ()))

    def close(self) -> None:
        """Leave the lane; a descriptor whose number is somebody else's by now is only forgotten."""
        if not self.open:
            return
        self.open = False
        pipes = self._writer, self._reader
        numbers = [pipe.fileno() for pipe in pipes]
        for pipe in pipes:
            pipe.close()  # the object only
        for fd in [*numbers, *(each.detach() for each in (self._put, self._take, self._sender))]:
            if is_still(fd, self._known[fd]):
                os.close(fd)


def _mapped(fd: int) -> mmap.mmap:
    """Map a board's memory. Raise OSError.

    Python's own way keeps a descriptor for as long as the memory, and closes its number, whosever it is by then.
    """
    memory = mmap.mmap(-1, BOARD_BYTES)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, _MMAP
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if libc.mmap(start, BOARD_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != start:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return memory


def make() -> list[int]:
    """Return the descriptors of a new lane, for `Lane`. Raise OSError."""
    made: list[int] = []
    try:
        made.append(os.memfd_create("sharedpool-lane", os.MFD_CLOEXEC))
        os.ftruncate(made[0], BOARD_BYTES)
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        made += [write_end, read_end]
        put, take = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        made += [put.detach(), take.detach()]
        with _mapped(made[0]) as memory, memoryview(memory) as view:
            board = Board(view)
            board.secret = os.urandom(SECRET_BYTES)
            board.release()
    except BaseException:
        for fd in made:
            os.close(fd)
        raise
    return made

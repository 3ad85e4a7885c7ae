"""The lane: connections move in it between the processes of one pool on one host, past the broker.

The broker makes one for each pool whose connections move, and passes its descriptors to the workers
at the desk: no other process gets in. A lane has

- a *board* (`wire/board.py`): shared memory that names the holder of each connection,
- a queue of *tickets*: a pipe, whose order the kernel keeps,
- a *shelf* for connections that nobody waits for: a pair of SEQPACKET sockets, oldest first,
- *wait sockets*: a datagram socket at an address of its own for each waiting thread.

The steps of a waiter and of a giver, in their order:

    waiter:  1. write its turn on the board   2. write a ticket   3. look at the shelf   4. wait
    giver:   1. take a ticket whose turn is current, write its holder on the board, and send
                the connection to its wait socket. Without a ticket:
             2. write the shelf on the board, and put the connection there
             3. look for a ticket once more

If a giver sees no ticket while a waiter sees an empty shelf, then the later one of the two looks
(waiter's 3, giver's 3) finds the other. So no connection lies on the shelf while a thread waits.

Nothing here blocks. A process that dies or stops between two steps costs a connection at most
(`broker/core/moves.py`), or a ticket: the waiter writes another one after a while.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from enum import Enum
from io import FileIO
from typing import NamedTuple

from msgspec import structs

from sharedpool.descriptors import passing
from sharedpool.descriptors.owned import Owned, identity, is_still
from sharedpool.digests import digest_of
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
DESCRIPTORS = 5  # of a lane, as they reach a worker: see `Lane`
# What a lane takes in the end. The board's descriptor is closed once it is mapped, but there are a
# timer and a socket to send with.
FOR_A_LANE = DESCRIPTORS + 1


class Ticket(NamedTuple):
    """A waiting thread's ticket."""

    member_number: int  # of its session
    place: int  # on the board
    request: int  # the request that waits at that place


class _Nothing(Enum):
    """A packet without a connection for this process."""

    REFUSED = "malformed, or a connection that is of no use here"
    OVER = "empty: a wake-up, or the other end is closed"


class MovingConnection(NamedTuple):
    """A connection that moves."""

    token: Token  # its lease's name
    cell: int  # the index of the lease's cell on the board
    live: Live  # what its next worker must know
    fd: int  # its socket


def network_namespace_id() -> str:
    """Return a name of this process's network namespace; "" where there are none.

    The addresses of the wait sockets belong to the namespace.
    """
    try:
        status = os.stat("/proc/self/ns/net")
    except OSError:
        return ""
    return f"{status.st_dev}-{status.st_ino}"


class Lane:
    """One process's end of a lane.

    `fds`: the descriptors of the board's memory, of the write and the read end of the queue, and of
    the put and the take end of the shelf. They are this object's, closed if this raises OSError.
    `member_number`: by which the board names this process as a holder; the broker uses `SHELF`.
    `refuse` is called for a connection that has arrived and is of no use here, or whose socket
    found no free descriptor.
    """

    def __init__(
        self,
        fds: Sequence[int],
        member_number: int,
        refuse: Callable[[Moved], None] = lambda _: None,
    ) -> None:
        self.member_number = member_number
        self._refuse = refuse
        memory, write_end, read_end, put_end, take_end = fds
        owners: list[_socket.socket] = []
        try:
            self.board = Board(memoryview(_mapped(memory)))
            self._secret = self.board.secret
            # Hashed, because other users see the wait sockets' addresses.
            self._name = digest_of(self._secret).hex()
            self._known = {fd: (identity(fd),) for fd in fds[1:]}
            # Objects, not numbers, because an object knows when another thread has closed it.
            self._writer, self._reader = (
                FileIO(write_end, "wb", closefd=False),
                FileIO(read_end, "rb", closefd=False),
            )
            owners += [_socket.socket(fileno=put_end)]
            owners += [_socket.socket(fileno=take_end)]
            self._shelf_in, self._shelf_out = owners
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
        self.leaving = False  # nothing is given any more

    def address(self, member_number: int, place: int) -> str:
        """Return the abstract address of a session's wait socket."""
        return f"\0sharedpool-{self._name}-{member_number}-{place}"

    def wait_socket(self, place: int) -> _socket.socket:
        """Return a socket at the address of one of this process's places. Raise OSError.

        It is C's own class, because gevent replaces Python's.
        """
        sock = _socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind(self.address(self.member_number, place))
        except BaseException:
            sock.close()
            raise
        return sock

    @property
    def outlets(self) -> list[int]:
        """The descriptors that become readable by a ticket or a connection on the shelf."""
        return [self._reader.fileno(), self._shelf_out.fileno()]

    # --- tickets

    def add_ticket(self, ticket: Ticket) -> bool:
        """Put a ticket at the end of the queue; return False if there is no room."""
        try:
            if not self._is_still_ours(self._writer.fileno()):
                return False
            self.board.count_request()
            return self._writer.write(_TICKET.pack(*ticket)) == _TICKET.size
        except (OSError, ValueError):  # no reader is left, or another thread has closed it
            return False

    def _is_queued(self) -> bool:
        """Return True if there is a ticket in the queue, stale ones included."""
        try:
            fd = self._reader.fileno()
            return self._is_still_ours(fd) and any(
                fcntl.ioctl(fd, termios.FIONREAD, bytes(_INT_BYTES))
            )
        except (OSError, ValueError):  # another thread has closed it
            return False

    def next_ticket(self) -> Ticket | None:
        """Take tickets out of the queue until one's thread still waits; return that one."""
        try:
            while self._is_still_ours(self._reader.fileno()):
                packet = self._reader.read(_TICKET.size)
                if packet is None or len(packet) < _TICKET.size:
                    return None
                ticket = Ticket._make(_TICKET.unpack(packet))
                if self.board.is_waiting_at(ticket.place, ticket.request):
                    return ticket
        except (OSError, ValueError):  # another thread has closed it
            pass
        return None

    # --- giving

    def give(self, item: MovingConnection) -> bool:
        """Give a connection to the first waiter, or put it on the shelf; return False if neither.

        The caller has sent the reset and detached the session from its connection object. After
        True the session is no longer this process's, whatever becomes of the caller's descriptor.
        """
        if self._deliver(item):
            return True
        if not self._shelve(item):
            return False
        # Look once more: a waiter may have come after the first look, and have seen an empty shelf.
        while self._is_queued():
            taken = self.take_from_shelf()
            if taken is None:
                break  # another process took it, perhaps the waiter itself
            moved, sock = taken
            other = MovingConnection(moved.token, moved.cell, moved.live, sock.fileno())
            if not self._deliver(other) and not self._shelve(other):
                sock.shutdown(socket.SHUT_RDWR)  # no room is left: end it, and its slot is free
            sock.close()
        return True

    def _deliver(self, item: MovingConnection) -> bool:
        ticket = self.next_ticket()
        while ticket is not None:
            if self._send(
                item,
                ticket.request,
                ticket.member_number,
                self.address(ticket.member_number, ticket.place),
            ):
                return True
            ticket = self.next_ticket()
        return False

    def _shelve(self, item: MovingConnection) -> bool:
        return self._send(item, 0, SHELF, None)

    def _send(self, item: MovingConnection, request: int, holder: int, address: str | None) -> bool:
        sock = self._sender if address is not None else self._shelf_in
        if (
            self.leaving
            or not self._is_still_ours(sock.fileno())
            or not self.board.has(item.cell, item.token)
        ):
            return False
        # The holder is written before the connection is sent. If this process dies in between, the
        # broker asks the holder on the board, and fences what nobody has: see `wire/board.py`.
        moves = self.board.set_holder(item.cell, holder)
        packet = self._secret + encode(Moved(request, item.token, item.cell, moves, item.live))
        try:
            if address is None:
                passing.send_with(sock, packet, item.fd)
            else:
                passing.send_with_to(sock, packet, item.fd, address)
        except OSError:  # the wait socket is gone or full, or the shelf is full
            self.board.set_holder(item.cell, self.member_number)
            return False
        return True

    def pass_on(self, member_number: int, place: int, moved: Moved, fd: int) -> bool:
        """Send a connection that is on no board to a wait socket; return False if it failed.

        The broker does so.
        """
        try:
            if self._is_still_ours(self._sender.fileno()):
                packet = self._secret + encode(moved)
                passing.send_with_to(self._sender, packet, fd, self.address(member_number, place))
                return True
        except OSError:  # the wait socket is gone or full
            pass
        return False

    def wake(self, ticket: Ticket) -> None:
        """Wake the thread of a ticket."""
        with contextlib.suppress(OSError):
            if self._is_still_ours(self._sender.fileno()):
                self._sender.sendto(b"", self.address(ticket.member_number, ticket.place))

    # --- taking

    def take_from_shelf(self) -> tuple[Moved, Owned] | None:
        """Take the connection that has been on the shelf longest; None if there is none."""
        try:
            while self._is_still_ours(self._shelf_out.fileno()):
                got = self._next(self._shelf_out)
                if isinstance(got, tuple):
                    moved, sock = got
                    return structs.replace(
                        moved, moves=self.board.set_holder(moved.cell, self.member_number)
                    ), sock
                if got is _Nothing.OVER:
                    break
        except OSError:  # the shelf is empty
            pass
        return None

    def receive(self, sock: _socket.socket) -> tuple[Moved, Owned] | None:
        """Receive a connection at a wait socket; None if there is none that can be used."""
        try:
            got = self._next(sock)
        except OSError:
            return None
        return got if isinstance(got, tuple) else None

    def _next(self, sock: _socket.socket) -> tuple[Moved, Owned] | _Nothing:
        """Receive a connection, or what else the next packet is. Raise OSError if there is none.

        A connection is refused if
        1. the board does not have it by its name, or it is of an older generation (unless the
           broker has sent it: those are on no board), or
        2. no descriptor was free for its socket.
        """
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
        return _Nothing.REFUSED if packet else _Nothing.OVER

    def moved_in(self, packet: bytes) -> Moved | None:
        """Return the message in a packet; None if it is malformed, or not of this lane."""
        if packet.startswith(self._secret):
            with contextlib.suppress(ProtocolError):
                return decode_moved(packet[SECRET_BYTES:])
        return None

    # --- the end

    def _is_still_ours(self, fd: int) -> bool:
        return self.open and is_still(fd, self._known.get(fd, ()))

    def close(self) -> None:
        """Leave the lane. A descriptor whose number another file has by now is only forgotten."""
        if not self.open:
            return
        self.open = False
        pipes = self._writer, self._reader
        numbers = [pipe.fileno() for pipe in pipes]
        for pipe in pipes:
            pipe.close()  # the object only, not the descriptor
        for fd in [
            *numbers,
            *(each.detach() for each in (self._shelf_in, self._shelf_out, self._sender)),
        ]:
            if is_still(fd, self._known[fd]):
                os.close(fd)


def _mapped(fd: int) -> mmap.mmap:
    """Map a board's memory. Raise OSError.

    Not by `mmap.mmap(fd)`: that keeps a duplicate of the descriptor, and closes its number in the
    end, even if another file has that number by then.
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

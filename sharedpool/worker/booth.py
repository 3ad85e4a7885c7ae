"""Where one thread waits for a lease: at a lock, or where connections can be handed over at a line to the desk.

On its own line the kernel wakes the thread itself, with the connection in the packet. Other threads of the process (a
checkin here, the link with a GRANT or a DENY) wake it by `ring`.
"""

from __future__ import annotations

import select
import socket
import threading
import weakref
from collections.abc import Callable

from sharedpool.errors import ProtocolError, SharedPoolError
from sharedpool.owned import Owned, identity, is_still, let_go
from sharedpool.spare import FOR_A_BOOTH, FOR_A_CONNECTION, make_sure_of
from sharedpool.wire import descriptors
from sharedpool.wire.codec import decode_from_desk, encode
from sharedpool.wire.desk import PACKET_BYTES, Ask, Leave, Pass, Settled, Withdraw
from sharedpool.wire.messages import Token
from sharedpool.worker.bell import Bell
from sharedpool.worker.lease import Ticket

# Takes in what was passed, with its socket, within so many seconds; returns the ticket to be woken, if any.
Receive = Callable[[Pass, Owned, float], Ticket | None]
# So long the link's thread, which keeps the heartbeat, waits for the reset of one that nobody is there for any more.
_LINKS_LIMIT_S = 0.05

# In one session. A booth has two descriptors here and one at the broker, and threads may wait by the hundred, greenlets
# by the thousand: more of them than this have no line, and wait at a gate, which has none.
_MOST = 32


class Gate:
    """A place to wait for other threads of this process alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake who waits here, or the next who comes to wait."""
        try:
            self._lock.release()
        except RuntimeError:
            pass  # rung already

    def wait(self, timeout_s: float) -> None:
        """Block until `ring` was called, at most `timeout_s` seconds."""
        self._lock.acquire(timeout=min(max(0.0, timeout_s), 1000.0))  # a lock's timeout has an upper bound


class Booth:
    """A place with a line to the desk at `path`. Raise OSError when that cannot be had.

    `open` is False once the broker has gone: what was asked here is asked by the link then.
    """

    def __init__(self, path: str, home: Booths) -> None:
        self.path = path
        self.home = home  # where it is given back
        self.open = True
        self.session, self.request = b"", 0  # whose request was last made here, and which; 0: none
        self.receive: Receive | None = None
        # False while what was read has not been taken in: if that is interrupted the line must end without a word, so
        # that the broker ends what it has passed here last.
        self.sure = True
        self.owner: weakref.ref[object] | None = None  # as its ticket's; None while it is free
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._line.setblocking(False)
            self._line.connect(path)
            self._known = (identity(self._line.fileno()),)
            self._bell = Bell()
            self._bell_number = self._bell.fileno()
        except BaseException:
            self._line.close()
            raise
        self._poller = select.poll()
        self._poller.register(self._line, select.POLLIN)
        self._poller.register(self._bell, select.POLLIN)

    def fileno(self) -> int:
        """Return the line's descriptor; -1 when closed."""
        return self._line.fileno()

    def ring(self) -> None:
        """Wake who waits here. From any thread; too late is no harm."""
        self._bell.ring()

    def ask(self, session: bytes, request: int, wait_ms: int, gone: list[Token]) -> bool:
        """Say that a thread waits here, and what was given back; return whether the broker will hear it."""
        self.session, self.request = session, request
        return self._say(encode(Ask(session, request, wait_ms, gone)))

    def withdraw(self) -> bool:
        """Say that it does not wait any more; SETTLED will come."""
        return self._say(encode(Withdraw(self.session, self.request)))

    def leave(self) -> bool:
        """Say that nothing is to be read here any more, before it is closed; return whether the broker will hear it."""
        return self._say(encode(Leave()))

    def _say(self, packet: bytes) -> bool:
        try:
            if is_still(self._line.fileno(), self._known):
                self._line.send(packet)
                return True
        except OSError:
            pass
        return False

    def wait(self, timeout_s: float) -> tuple[Pass, Owned] | None:
        """Block until something comes, `ring` is called or `timeout_s` seconds are over.

        Return what was passed, with its socket.
        """
        for fd, _ in self._poller.poll(max(0.0, min(timeout_s, 1000.0)) * 1000):
            if fd == self._bell_number:
                self._bell.hush()
        return self.read()[0] if self.open else None

    def read(self) -> tuple[tuple[Pass, Owned] | None, bool]:
        """Read one packet, if there is one: what was passed, and whether the withdrawn request is settled."""
        self.sure = False  # until all that was passed is taken in
        try:
            packet, socks = descriptors.receive_sockets(self._line, PACKET_BYTES)
        except BlockingIOError:
            self.sure = True
            return None, False
        except OSError:
            packet, socks = b"", []
        if not packet:
            self._end()
            return None, False
        try:
            message = decode_from_desk(packet)
            if isinstance(message, Settled):
                self.sure = True
                return None, True
            if len(socks) == 1 and isinstance(message, Pass):
                return (message, socks.pop()), False
            self._end()  # no descriptor was free for it here: by that the broker ends it, and it is asked for again
            return None, False
        except ProtocolError:
            return None, False  # not of our version: its HELLO was refused
        finally:
            for sock in socks:
                sock.close()

    def _end(self) -> None:
        """Have nothing more come here; who waits can still be rung."""
        self.open = False
        self._poller.unregister(self._line)
        let_go(self._line, self._known)

    def close(self) -> None:
        """Leave."""
        self.open = False
        let_go(self._line, self._known)
        self._bell.close()


class Booths:
    """One link's booths: the free ones, and the `unsettled`, which the link reads until they are free."""

    def __init__(self) -> None:
        self.path = ""  # of the desk; empty where there is none
        self._free: list[Booth] = []
        self._all: set[Booth] = set()
        self._needed = 0  # at a time, since the last `trim`
        self.unsettled: dict[int, Booth] = {}
        self._suspected: set[Booth] = set()

    def __len__(self) -> int:
        return len(self._all)

    def take(self, ticket: Ticket, receive: Receive) -> Booth | None:
        """Return a booth for a ticket's thread, or None where there are none; `receive` takes in what comes there."""
        path = self.path
        self._needed = max(self._needed, len(self._all) - len(self._free) + 1)
        while path:
            try:
                booth = self._free.pop()
            except IndexError:
                if len(self._all) >= _MOST:
                    return None
                try:
                    # What it would take from a connection that is granted: without it that is asked for by the link.
                    make_sure_of(FOR_A_BOOTH + FOR_A_CONNECTION, "a line to the desk")
                    booth = Booth(path, self)
                except (OSError, SharedPoolError):
                    return None
                booth.owner, booth.receive = ticket.owner, receive
                self._all.add(booth)
                return booth
            booth.owner, booth.receive = ticket.owner, receive
            if booth.open and booth.path == path:
                return booth
            self.discard(booth)
        return None

    def put(self, booth: Booth) -> None:
        """Give a booth back where nothing more will come."""
        booth.owner, booth.request, booth.receive = None, 0, None
        if booth.open and booth.sure:
            self._free.append(booth)
        else:
            self.discard(booth)

    def take_strays(self) -> None:
        """Take back booths that nobody is in and that were not given back: their threads were interrupted.

        Each must look so at two calls: a thread may be taking or leaving it. In the link's thread.
        """
        out = self._all - set(self._free) - set(self.unsettled.values())
        missing = {booth for booth in out if booth.owner is None or booth.owner() is None}
        found = missing & self._suspected
        self._suspected = missing - found
        for booth in found:
            if booth.sure and booth.request and booth.withdraw():
                self.watch(booth)
            else:
                booth.sure = booth.sure and not booth.request
                self.put(booth)

    def trim(self) -> None:
        """Close free booths that were not needed since the last call: what a crowd has taken is not kept for ever."""
        while len(self._all) > self._needed:
            try:
                booth = self._free.pop(0)
            except IndexError:
                break  # needed after all
            booth.leave()  # else the broker would end what was passed here, if it has not heard of that yet
            self.discard(booth)
        self._needed = len(self._all) - len(self._free)

    def watch(self, booth: Booth) -> None:
        """Have the link read on."""
        self.unsettled[booth.fileno()] = booth

    def read(self, fd: int) -> None:
        """Read, in the link's thread, what came for one who waits no more."""
        booth = self.unsettled[fd]
        passed, settled = booth.read()
        if passed is not None and booth.receive is not None:
            ticket = booth.receive(*passed, _LINKS_LIMIT_S)
            booth.sure = True
            if ticket is not None:
                ticket.wake()
        if settled or not booth.open:
            self.unsettled.pop(fd, None)
            self.put(booth)

    def discard(self, booth: Booth) -> None:
        """Close a booth."""
        self.unsettled.pop(booth.fileno(), None)
        self._all.discard(booth)
        booth.close()

    def close(self) -> None:
        """Close all; in a forked child: let go of the parent's."""
        self.path = ""
        for booth in list(self._all):
            self.discard(booth)
        self._free.clear()

"""A worker at the desk: what `booth.py`, `checkout._wait`, `holdings._give` and `holdings.receive` do.

A thread that waits where connections can be handed over has a booth with a line of its own. It asks there (a step after
it has taken its place in the cache: `asking`), reads what comes, and leaves; where something may still come the link
reads on (`unsettled`), and nobody reads a free booth. Giving takes two steps more than closing: the session is taken
from under the connection, then the broker is told, then the cache (`giving`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from sharedpool.errors import SharedPoolError
from sharedpool.wire.codec import decode_from_desk, decode_to_desk, encode
from sharedpool.wire.desk import Ask, Deposit, Give, Live, Moved, Pass, Settled, Stay, ToDesk, Withdraw
from sharedpool.wire.messages import Interrupt, ReleaseReason
from sharedpool.worker.cache import Cache
from sharedpool.worker.lease import Closing, Lease, Ticket

from .network import Packet, Wire
from .server import Proc

if TYPE_CHECKING:
    from .world import World

_ASKED_FOR = (ReleaseReason.TAKEN, ReleaseReason.OWED)


@dataclass(eq=False)
class Conn:
    """A connection as its process sees it."""

    proc: Proc
    lease: Lease | None = None  # set while it is checked out
    closed: bool = False
    vacated: bool = False  # given: a shell
    movable: bool = False

    @property
    def works(self) -> bool:
        return not (self.closed or self.vacated or self.proc.dead or self.proc.cut)


@dataclass(eq=False, slots=True)
class Booth:
    """Where a thread waits; `asked`: the broker may have heard of it here."""

    wire: Wire
    open: bool = True
    asked: bool = False


class Lack(IntEnum):
    """What a worker has no descriptor for, when the next connection comes."""

    NOTHING = 0
    SOCKET = 1  # the connection's own
    SHELL = 2


class Step(IntEnum):
    """How far the giving of a connection has come."""

    VACATED = 0
    SAID = 1


@dataclass(eq=False, slots=True)
class Giving:
    """A thread that gives a connection."""

    closing: Closing
    conn: Conn
    live: Live
    step: Step = Step.VACATED


class AtTheDesk:
    """The part of a worker that goes to the desk. `hands_over`: its booths have a path."""

    world: World
    id: bytes
    cache: Cache
    established: bool
    tickets: list[Ticket]
    patience: dict[int, bool]

    def __init__(self, *, handover: bool, slice_s: float) -> None:
        self.desk: Wire | None = None
        self.handover = handover
        self.hands_over = False
        self.slice_s = slice_s
        self.free: list[Booth] = []
        self.unsettled: list[Booth] = []
        self.places: dict[Ticket, Booth] = {}
        self.asking: dict[Ticket, Ask] = {}
        self.quitting: list[Ticket] = []
        self.giving: list[Giving] = []
        self.broken_shells = False
        self.lacks = Lack.NOTHING
        self.adopted = 0

    # --- the session's line

    def open_desk(self, path: str, handover: bool) -> None:
        """Go to the desk, anew; hand in all sockets."""
        if self.desk is not None:
            self.desk.leave()
        self.desk = self.world.connect(self) if path else None  # type: ignore[arg-type]
        if self.desk is not None:
            self.desk.say(Stay(self.id))
        self.hands_over = handover and self.handover and self.desk is not None
        self.cache.slices.slice_s, self.cache.slices.hands_over = self.slice_s, self.hands_over
        for lease in self.cache.leases.values():
            lease.deposited = False
        self.deposit_all()

    def deposit(self, lease: Lease, conn: Conn) -> None:
        if not lease.deposited and self.desk is not None and not conn.vacated:
            lease.deposited = self.desk.say(Deposit(self.id, lease.token), conn.proc)

    def deposit_all(self) -> None:
        for lease in self.cache.leases.values():
            conn = self.conn_of(lease)
            if conn is not None and not conn.closed:
                self.deposit(lease, conn)

    @staticmethod
    def conn_of(lease: Lease) -> Conn | None:
        conn = lease.conn or (lease.ref() if lease.ref else None)
        return conn if isinstance(conn, Conn) else None

    # --- booths

    def take_booth(self) -> Booth | None:
        while self.hands_over:
            if not self.free:
                wire = self.world.connect(self)  # type: ignore[arg-type]
                return None if wire is None else Booth(wire)
            booth = self.free.pop()
            if booth.open:
                booth.asked = False
                return booth
        return None

    def put(self, booth: Booth) -> None:
        """Give a booth back where nothing more will come."""
        if booth.open:
            self.free.append(booth)
        else:
            booth.wire.leave()

    def go_to_desk(self, ticket: Ticket) -> None:
        """A thread that had asked by link, and hears that there is a desk, goes there; it has yet to ask."""
        if ticket in self.asking or ticket not in self.tickets or ticket in self.quitting:
            return
        booth = self.places.get(ticket)
        if booth is None or not booth.open:
            if booth is not None:
                booth.wire.leave()
            booth = self.take_booth()
            if booth is None:
                self.places.pop(ticket, None)
                self.cache.tickets.ask_by_link(ticket)
                return
            self.places[ticket] = booth
        booth.asked = True
        left_ms = 60_000 if self.patience[ticket.request] else 0
        self.asking[ticket] = Ask(self.id, ticket.request, left_ms, self.cache.gone())

    def go_on_asking(self, ticket: Ticket) -> None:
        """The thread that has its place in the cache says so at the desk; it may have been served meanwhile."""
        ask = self.asking.pop(ticket)
        if not self.places[ticket].wire.say(ask):
            self.cache.tickets.ask_by_link(ticket)
            self.flush()
        if ticket.settled:
            self.leave_booth(ticket)

    def leave_booth(self, ticket: Ticket) -> None:
        """A thread does not wait any more, whatever has come of it."""
        if ticket in self.asking:
            return  # it does not know yet
        booth = self.places.pop(ticket, None)
        if booth is None:
            return
        if not booth.asked or ticket.finished or not booth.wire.say(Withdraw(self.id, ticket.request)):
            self.put(booth)
        else:
            self.unsettled.append(booth)

    def look(self, ticket: Ticket) -> bool:
        """A waiting thread reads a packet, or sees that the broker has gone; return whether there was anything."""
        booth = self.places[ticket]
        if booth.wire.down:
            packet = booth.wire.down.popleft()
            if isinstance(packet.message, Pass):
                self.take_in(booth, packet)
                if not booth.open:
                    self.cache.tickets.ask_by_link(ticket, again=True)
        elif booth.wire.torn and booth.open:
            booth.open = False
            self.cache.tickets.ask_by_link(ticket, again=True)
        else:
            return False
        self.flush()
        return True

    def read(self, booth: Booth) -> bool:
        """The link reads a packet for one who waits no more; return whether there was anything."""
        settled = False
        if booth.wire.down:
            packet = booth.wire.down.popleft()
            if isinstance(packet.message, Pass):
                self.take_in(booth, packet)
            settled = isinstance(packet.message, Settled)
        elif booth.wire.torn:
            booth.open = False
        else:
            return False
        if settled or not booth.open:
            self.unsettled.remove(booth)
            self.put(booth)
        self.flush()
        return True

    @property
    def readable(self) -> list[Ticket | Booth | Wire]:
        """Where somebody who reads has something to read."""
        found: list[Ticket | Booth | Wire] = [
            ticket
            for ticket, booth in self.places.items()
            if ticket not in self.asking and (booth.wire.down or (booth.wire.torn and booth.open))
        ]
        found += [booth for booth in self.unsettled if booth.wire.down or booth.wire.torn]
        if self.desk is not None and self.desk.down:
            found.append(self.desk)
        return found

    def read_home(self) -> None:
        raise NotImplementedError

    def look_everywhere(self) -> bool:
        """All that came is read; return whether there was anything."""
        moved = False
        while found := self.readable:
            for each in found:
                if isinstance(each, Wire):
                    if each is self.desk and each.down:
                        self.read_home()
                        moved = True
                elif isinstance(each, Booth):
                    moved |= each in self.unsettled and self.read(each)
                else:
                    moved |= each in self.places and self.look(each)
        return moved

    # --- receiving

    def take_in(self, booth: Booth, packet: Packet) -> None:
        """Take in what was passed on; where its socket could not come along the line ends."""
        lacks, self.lacks = self.lacks, Lack.NOTHING
        if lacks is Lack.SOCKET:
            packet.take()
            booth.open = False
            booth.wire.leave()
        else:
            self.wake(self.adopt(packet, lacks))

    def adopt(self, packet: Packet, lacks: Lack) -> Ticket | None:
        """Take in a connection; return the ticket to wake."""
        proc, message = packet.take(), decode_from_desk(encode(packet.message))
        assert proc is not None
        assert isinstance(message, Pass)
        assert message.live.backend == proc.backend, "a socket and a word of two different backends"
        if self.broken_shells or lacks is Lack.SHELL:
            self.cache.refuse(message)
            if self.broken_shells:
                self.handover = self.hands_over = False
            return None
        if message.trial:
            self.cache.out.append(Interrupt(message.token, trial=True))
        conn = Conn(proc, movable=True)
        left_ms, now = message.live.left_ms, self.world.now
        retire_at = float("inf") if left_ms is None else now + left_ms / 1000
        try:
            ticket = self.cache.passed(message, conn, retire_at, now)
        except SharedPoolError:
            proc.cut = True
            return None
        proc.holders.add(self.id)
        self.adopted += 1
        return ticket

    # --- giving

    def may_give(self, closing: Closing, conn: Conn) -> bool:
        lease = closing.lease
        asked_for = closing.reason in _ASKED_FOR and self.hands_over and conn.movable
        return asked_for and lease.deposited and lease.backend is not None and conn.works

    def give(self, closing: Closing, conn: Conn) -> Giving:
        """Take the session from under a connection that was reset."""
        lease, proc = closing.lease, conn.proc
        self.cache.giving(lease)
        assert not proc.busy, "a reset in the middle of a query"
        assert lease.backend is not None
        left_s = lease.retire_at - self.world.now
        left_ms = None if left_s == float("inf") else max(0, int(left_s * 1000))
        giving = Giving(closing, conn, Live(lease.backend, lease.generation, b"parameters", left_ms))
        conn.vacated = True
        self.giving.append(giving)
        return giving

    def go_on_giving(self, giving: Giving) -> None:
        lease, proc = giving.closing.lease, giving.conn.proc
        if giving.step is Step.VACATED:
            give = Give(self.id, lease.token, giving.closing.reason, giving.live)
            said = self.desk is not None and self.desk.say(give)
            proc.holders.discard(self.id)
            giving.step = Step.SAID
            if not said:
                proc.cut = True
                self.giving.remove(giving)
                self.cache.closed(lease, giving.closing.reason, gone=proc.seen_dead)
                self.flush()
        else:
            self.giving.remove(giving)
            self.cache.given(lease)
            self.cache.slices.parted(self.world.now)
            self.flush()

    # --- the end

    def leave_desk(self) -> None:
        """All lines are closed: the pool is over, or the process."""
        booths = [*self.free, *self.unsettled, *self.places.values()]
        for wire in [*(booth.wire for booth in booths), *([] if self.desk is None else [self.desk])]:
            wire.leave()

    def flush(self) -> None:
        raise NotImplementedError

    def wake(self, ticket: Ticket | None) -> None:
        raise NotImplementedError


def checked(packet: Packet) -> ToDesk:
    """Return what a packet says, as the broker reads it."""
    assert not isinstance(packet.message, Pass | Settled | Moved)
    return decode_to_desk(encode(packet.message))

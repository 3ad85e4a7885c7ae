"""A worker at the desk: its program's line, and what `Giver.give` and `LocalState.deposit` do.

Giving takes two steps more than closing: the session is taken from under the connection, then the
broker is told, then the cache (`giving`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from sharedpool.wire.codec import decode_to_desk, encode
from sharedpool.wire.desk import (
    Deposit,
    Give,
    LaneInvitation,
    LineOwner,
    Live,
    Moved,
    Opened,
    ToDesk,
)
from sharedpool.wire.messages import ReleaseReason, Welcome
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.lease import Closing, Lease
from tests.model.network import Packet, Wire
from tests.model.scale import EXPIRATION_S
from tests.model.server import Proc

if TYPE_CHECKING:
    from tests.model.world import World

_ASKED_FOR = (ReleaseReason.TAKEN, ReleaseReason.RETURN_DUE)


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


class Lack(IntEnum):
    """What a worker has no descriptor for, when the next connection comes."""

    NOTHING = 0
    SOCKET = 1  # the connection's own
    SHELL = 2
    WAIT_SOCKET = 3  # where the next thread is to wait


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
    """The part of a worker that goes to the desk. `hands_over`: it takes part in the hand-over."""

    world: World
    id: bytes
    cache: Cache
    established: bool

    def __init__(self, *, handover: bool, slice_s: float) -> None:
        self.desk: Wire | None = None
        self.handover = handover
        self.hands_over = False
        self.slice_s = slice_s
        self.giving: list[Giving] = []
        self.broken_shells = False
        self.lacks = Lack.NOTHING
        self.adopted = 0

    # --- the session's line

    def go_to_desk(self, path: str) -> None:
        """Go to the desk, anew: another broker is there than before, or none was."""
        if self.desk is not None:
            self.desk.leave()
        self.desk = self.world.connect(self) if path else None  # type: ignore[arg-type]
        if self.desk is not None:
            self.desk.say(LineOwner(self.id))

    def welcome_at_desk(self, welcome: Welcome) -> None:
        """Take part in the hand-over, if it can be; deposit all sockets."""
        self.hands_over = welcome.handover and self.handover and self.desk is not None
        self.cache.set_terms(EXPIRATION_S, welcome.ttl_ms / 1000, hands_over=self.hands_over)
        for lease in self.cache.leases.values():
            lease.deposited = False
        self.deposit_all()

    def deposit(self, lease: Lease, conn: Conn) -> None:
        if not lease.deposited and self.desk is not None and not conn.vacated:
            lease.deposited = self.desk.say(Deposit(self.id, lease.token), conn.proc)

    def name_backend(self, lease: Lease, conn: Conn) -> None:
        if lease.deposited and self.desk is not None:
            self.desk.say(Opened(self.id, lease.token, conn.proc.backend))

    def deposit_all(self) -> None:
        for lease in self.cache.leases.values():
            conn = self.conn_of(lease)
            if conn is not None and not conn.closed:
                self.deposit(lease, conn)

    @staticmethod
    def conn_of(lease: Lease) -> Conn | None:
        conn = lease.conn or (lease.ref() if lease.ref else None)
        return conn if isinstance(conn, Conn) else None

    @property
    def readable(self) -> bool:
        """Whether something has come on the program's line."""
        return self.desk is not None and bool(self.desk.down)

    def read_home(self) -> None:
        raise NotImplementedError

    def read_all(self) -> bool:
        """All that came there is read; return whether there was anything."""
        moved = self.readable
        while self.readable:
            self.read_home()
        return moved

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
        giving = Giving(
            closing, conn, Live(lease.backend, lease.generation, b"parameters", left_ms)
        )
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
            self.cache.time_slice.note_given(self.world.now)
            self.flush()

    # --- the end

    def leave_desk(self) -> None:
        """The line is closed: the pool is over, or the process."""
        if self.desk is not None:
            self.desk.leave()

    def flush(self) -> None:
        raise NotImplementedError


def checked(packet: Packet) -> ToDesk:
    """Return what a packet says, as the broker reads it."""
    assert not isinstance(packet.message, LaneInvitation | Moved)
    return decode_to_desk(encode(packet.message))

"""What is said at the desk.

The *desk* (═) is a unix SEQPACKET socket beside the ZeroMQ one: each DEPOSIT carries a duplicate of a connection's
socket. When it closes, the broker is gone. A thread that waits where connections can be handed over has a line of its
own there, on which the kernel wakes it:

      ASK(request, wait)                        ═════►                               instead of ACQUIRE
      GIVE(token)                               ═════►                               from whoever was asked to
                                                ◄═════  PASS(request, token) + socket, the connection goes on
      WITHDRAW(request)                         ═════►                               it waits no more
                                                ◄═════  SETTLED(request)             no PASS for it follows
      LEAVE                                     ═════►                               before the end: all is read
      STAY                                      ═════►                               here until the program ends
                                                ◄═════  LET_IN(session) + 5          the lane is open to it
      JOINED(session)                           ═════►                               it will use it

In the lane (`sharedpool/lane.py`) connections go from worker to worker, each as a MOVED with its socket.
"""

from __future__ import annotations

import msgspec

from sharedpool.wire.messages import Backend, ReleaseReason, Struct, Token

# A packet is no longer, and a GIVE leaves room for what a PASS has more.
PACKET_BYTES, GIVE_BYTES = 8192, 7936


class Deposit(Struct, frozen=True, tag="deposit"):
    """The socket that comes with this packet belongs to the lease's connection."""

    session: bytes
    token: Token


class Ask(Struct, frozen=True, tag="ask"):
    """An ACQUIRE whose answer may be a PASS, on this line. `gone` is as in RENEW: their RELEASE may come later."""

    session: bytes
    request: int
    wait_ms: int
    gone: list[Token] = msgspec.field(default_factory=list)


class Withdraw(Struct, frozen=True, tag="withdraw"):
    """A CANCEL for what was asked on this line; SETTLED is the answer."""

    session: bytes
    request: int


class Leave(Struct, frozen=True, tag="leave"):
    """This line will be closed, and all that was passed on it has been read."""


class Stay(Struct, frozen=True, tag="stay"):
    """This line is the program's own: without a LEAVE it ends with it, also when its process goes on with another.

    `program`: what the names of all its sessions begin with.
    """

    program: bytes


class Live(Struct, frozen=True):
    """A connection that moves: what its next worker must know of it. `left_ms` is what is left of its lifetime.

    Its reset was sent, and the answer is to be read first (`worker/reset.py`). `parameters` are the session's of before
    that, as libpq knows them (msgpack of a map), `names` what it says of its server (`worker/names.py`); the broker
    does not read them.
    """

    backend: Backend
    generation: int
    parameters: bytes
    left_ms: int | None = None
    names: bytes = b""


class Give(Struct, frozen=True, tag="give"):
    """The lease's connection, which is at the desk, is clean, and nobody's here any more."""

    session: bytes
    token: Token
    reason: ReleaseReason
    live: Live


class Pass(Struct, frozen=True, tag="pass"):
    """A lease whose connection is open: its socket comes with this packet. `serial` and `owed` are as in GRANT.

    `pressed`: others wait for what is owed; else it is owed because the pool is shared, and anybody may ask for it.
    `trial`: no cancel was seen to work on a connection of this pool that has moved; try one before it is used.
    """

    request: int
    token: Token
    serial: int
    owed: int
    pressed: bool
    live: Live
    trial: bool = False


class Settled(Struct, frozen=True, tag="settled"):
    """A request that was withdrawn will not be answered any more."""

    request: int


class LetIn(Struct, frozen=True, tag="let_in"):
    """A pool's lane: its descriptors come with this packet (`lane.Descriptors`). For the session with this channel.

    `number` is never another session's in the lane; `index` is where its turns are on the board. `network` is the
    broker's network namespace, in which the addresses of the lane's places are.
    """

    session: bytes
    number: int
    index: int
    network: str


class Joined(Struct, frozen=True, tag="joined"):
    """The session gives in the lane, and waits there, whenever connections move in it."""

    session: bytes


class Moved(Struct, frozen=True, tag="moved"):
    """A lease whose connection is open, from worker to worker: its socket comes with this packet.

    `request` is the receiver's own; 0 on the shelf. `cell` is the lease's on the board, `moves` how often it has moved
    with this time.
    """

    request: int
    token: Token
    cell: int
    moves: int
    live: Live


ToDesk = Deposit | Ask | Withdraw | Leave | Stay | Give | Joined
FromDesk = Pass | Settled | LetIn

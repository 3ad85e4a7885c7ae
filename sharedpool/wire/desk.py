"""What is said at the desk.

The *desk* (═) is a unix SEQPACKET socket beside the ZeroMQ one: each DEPOSIT carries a duplicate of a connection's
socket. When it closes, the broker is gone. Each program has one line there:

      LINE_OWNER                                ═════►                               here until the program ends
                                                ◄═════  LANE_INVITATION(session) + 5          the lane is open to it
      JOINED(session)                           ═════►                               it will use it, or will not
      DEPOSIT(token) + socket                   ═════►                               into custody
      GIVE(token)                               ═════►                               to whom the broker likes
      LEAVE                                     ═════►                               before the end, if it goes on

In the lane (`sharedpool/lane/lane.py`) connections go to who waits there, each as a MOVED with its socket: from another
worker, or from the broker.
"""

from __future__ import annotations

from sharedpool.wire.messages import Backend, ReleaseReason, Struct, Token

# A packet is no longer, and a GIVE leaves room for what a MOVED has more.
PACKET_BYTES, GIVE_BYTES = 8192, 7936


class Deposit(Struct, frozen=True, tag="deposit"):
    """The socket that comes with this packet belongs to the lease's connection."""

    session: bytes
    token: Token


class Leave(Struct, frozen=True, tag="leave"):
    """This line will be closed, and its program goes on."""


class LineOwner(Struct, frozen=True, tag="line_owner"):
    """This line is the program's own: without a LEAVE it ends with it, also when its process goes on with another.

    `program`: what the names of all its sessions begin with.
    """

    program: bytes


class Live(Struct, frozen=True):
    """A connection that moves: what its next worker must know of it. `left_ms` is what is left of its lifetime.

    Its reset was sent, and the answer is to be read first (`worker/connection/reset.py`). `parameters` are the
    session's of before that, as libpq knows them (msgpack of a map), `names` what it says of its server
    (`worker/connection/server_facts.py`); the broker does not read them.
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


class Passed(Struct, frozen=True):
    """What the broker says with a connection that it passes on itself. `serial` and `returns_due` are as in GRANT.

    `others_wait`: others wait for what is owed; else it is owed because the pool is shared, and anybody may ask for it.
    `trial`: no cancel was seen to work on a connection of this pool that has moved; try one before it is used.
    """

    serial: int
    returns_due: int
    others_wait: bool
    trial: bool = False


class LaneInvitation(Struct, frozen=True, tag="lane_invitation"):
    """A pool's lane: its descriptors come with this packet (`lane.Descriptors`). For the session with this channel.

    `number` is never another session's in the lane; `index` is where its turns are on the board. `network` is the
    broker's network namespace, in which the addresses of the lane's places are.
    """

    session: bytes
    number: int
    index: int
    network: str


class Joined(Struct, frozen=True, tag="joined"):
    """The session gives in the lane, and waits there, whenever connections move in it; or it does not `take_part`."""

    session: bytes
    takes_part: bool = True


class Moved(Struct, frozen=True, tag="moved"):
    """A lease whose connection is open, to who waits in the lane: its socket comes with this packet.

    `request` is the receiver's own; 0 on the shelf. `cell` is the lease's on the board, `moves` how often it has moved
    with this time. `passed` tells that it is not from another worker, but a new lease of the broker's (`cell` -1).
    """

    request: int
    token: Token
    cell: int
    moves: int
    live: Live
    passed: Passed | None = None


ToDesk = Deposit | Leave | LineOwner | Give | Joined
FromDesk = LaneInvitation

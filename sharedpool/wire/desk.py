"""The messages at the desk and in the lane.

The *desk* (═) is a unix SEQPACKET socket beside the ZeroMQ one, over which descriptors can be sent.
Its end tells that the broker has ended. Each program has one line to it:

      LINE_OWNER                ═════►                               kept until the program ends
                                ◄═════  LANE_INVITATION + 5          with a lane's descriptors
      JOINED(session)           ═════►                               it takes part, or does not
      DEPOSIT(token) + socket   ═════►                               into the broker's custody
      OPENED(token, backend)    ═════►                               which one it reaches
      GIVE(token)               ═════►                               for any other worker
      LEAVE                     ═════►                               the program goes on without it

In the *lane* (`lane/lane.py`) connections go straight to waiting threads, each as a MOVED with its
socket. The sender is another worker or the broker.
"""

from __future__ import annotations

from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Backend, Struct, Token

# The greatest packet, and the greatest GIVE: a MOVED made from it has more fields.
PACKET_BYTES, GIVE_BYTES = 8192, 7936


class Deposit(Struct, frozen=True, tag="deposit"):
    """Deposit the socket that comes with this packet, that of the lease's connection."""

    session: bytes
    token: Token


class Opened(Struct, frozen=True, tag="opened"):
    """Name the backend of a lease's connection, before CONFIRM does.

    CONFIRM follows a moment later, from another thread. If the process is killed in between, the
    broker still knows which backend to end, and whether its socket's end proves the backend's.
    """

    session: bytes
    token: Token
    backend: Backend


class Leave(Struct, frozen=True, tag="leave"):
    """Announce that this line will be closed while its program goes on."""


class LineOwner(Struct, frozen=True, tag="line_owner"):
    """Announce that this line ends, without a LEAVE, only when its program does.

    That includes a process that goes on with another program (exec).
    """

    # The prefix of the names of the program's sessions.
    program: bytes


class Live(Struct, frozen=True):
    """A connection that moves, as its next worker must know it.

    Its reset was sent. The receiver reads the answer first (`worker/connection/reset.py`). The
    broker reads neither `parameters` nor `names`.
    """

    backend: Backend
    generation: int
    # The session's parameters from before the reset, as libpq knows them: msgpack of a map.
    parameters: bytes
    # What is left of its lifetime.
    left_ms: int | None = None
    # The server's name and login (`worker/connection/server_facts.py`).
    names: bytes = b""


class Give(Struct, frozen=True, tag="give"):
    """Offer a lease's connection to others.

    The broker has its socket, its session is reset, and this worker has detached from it.
    """

    session: bytes
    token: Token
    reason: ReleaseReason
    live: Live


class Passed(Struct, frozen=True):
    """What the broker adds to a connection that it passes on itself."""

    # As in GRANT.
    serial: int
    returns_due: int
    # Others wait for the returns. Else they are due because the pool is shared, and anybody may ask
    # for a connection at any time.
    others_wait: bool
    # No cancel was seen to work on a moved connection of this pool: test one before the use.
    trial: bool = False


class LaneInvitation(Struct, frozen=True, tag="lane_invitation"):
    """Invite a session to its pool's lane, whose descriptors come with this packet."""

    session: bytes
    # By it the board names the session as a holder. No other session will ever have it there.
    member_number: int
    # Where its turns are on the board.
    index: int
    # The broker's network namespace, in which the addresses of the lane's places are.
    network: str


class Joined(Struct, frozen=True, tag="joined"):
    """Answer an invitation.

    A session that takes part gives and waits in the lane while connections move there.
    """

    session: bytes
    takes_part: bool = True


class Moved(Struct, frozen=True, tag="moved"):
    """Send a lease and its open connection to a waiting thread.

    The socket comes with this packet.
    """

    # The receiver's own number of the request; 0 on the shelf.
    request: int
    token: Token
    # The lease's cell on the board, -1 for none.
    cell: int
    # How often it has moved, this time included.
    moves: int
    live: Live
    # Set if it is a new lease from the broker, and not another worker's.
    passed: Passed | None = None


ToDesk = Deposit | Opened | Leave | LineOwner | Give | Joined
FromDesk = LaneInvitation

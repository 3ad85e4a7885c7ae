"""What one process knows of a lease, and of a thread that waits for one. Pure."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from sharedpool.wire.desk import Live
from sharedpool.wire.messages import Deny, ReleaseReason
from sharedpool.wire.values import Backend, Phase, Token
from sharedpool.worker.core.callsite import Stack

HANDING_OUT_LIMIT_S = 30.0
CLOSING_LIMIT_S = 3.0


class Lease:
    """A slot that this process holds, with its connection, which is opaque here."""

    __slots__ = (
        "arrived_at",
        "at_close",
        "backend",
        "cache",
        "cancelled",
        "cell",
        "conn",
        "connect_by",
        "deposited",
        "fast_checkin",
        "fast_checkout_until",
        "generation",
        "idle_s",
        "integration_state",
        "key",
        "live",
        "looked_dropped_since",
        "movable",
        "moves",
        "needs_configure",
        "phase",
        "reached_directly",
        "ref",
        "refused_with",
        "retire_at",
        "since",
        "stack",
        "thread",
        "timed",
        "token",
        "waiter",
    )  # fmt: skip

    def __init__(self, token: Token, waiter: Waiter | None, now: float) -> None:
        # --- what and when
        self.token = token
        self.phase = Phase.CONNECTING
        self.since = now  # when the phase began
        self.arrived_at = now  # when this process got the connection open
        self.idle_s = 0.0  # how long it lay idle before this use
        self.retire_at = float("inf")  # the end of `max_lifetime`
        # The newest generation that was known when the lease was granted.
        self.generation = 0
        self.cache: object = None  # the cache that the lease belongs to

        # --- who has it
        # The connection while it is idle, handed on or closed. While it is checked out only `ref`
        # refers to it, so that a connection dropped by its user is collected, and seen to be.
        self.conn: object | None = None
        self.ref: weakref.ref[object] | None = None
        # The waiter that the lease was given to, while only the waiter's thread knows of it.
        self.waiter = None if waiter is None else weakref.ref(waiter)
        self.thread = 0  # identifier of the thread that has it
        self.stack: Stack = ()  # where it was last checked out (`debug_checkouts`)
        self.key: object = None  # the user's key of the checkout
        self.looked_dropped_since: float | None = None  # `since`, when the last heartbeat missed it
        # What an integration keeps with the session while it stays in this process.
        self.integration_state: Any = None
        # What the user's `close()` calls instead of closing the connection.
        self.at_close: Callable[[Any], None] | None = None

        # --- the fast path
        # The next checkin needs no look at key, generation, settings, or a revocation.
        self.fast_checkin = True
        # Until then a checkout may lend the connection as it is: not fresh and not wrapped.
        self.fast_checkout_until = float("-inf")
        self.timed = False  # this use by the fast path is a sample (`timings.py`)

        # --- the connect
        self.backend: Backend | None = None
        self.connect_by = float("inf")  # a connect that has not begun by then must not begin
        self.reached_directly = False  # GRANT's `direct`
        self.refused_with = ""  # GRANT's `code`

        # --- the hand-over
        self.movable = False  # the session can be passed to another process
        self.deposited = False  # the broker has a copy of the socket
        # The connection came from another process and is not yet set up for this one.
        self.needs_configure = False
        self.cell = -1  # the lease's cell on the board (`wire/board.py`)
        self.moves = 0  # how often it had moved when it came
        self.live: Live | None = None  # what came along with it in the lane
        # The broker was asked to cancel the query, and only the broker knows when that is over.
        self.cancelled = False

    def allow_fast_checkout(self, as_is: bool) -> None:
        """Set whether the next checkouts may lend the connection as it is: not fresh or wrapped."""
        self.fast_checkout_until = self.retire_at if as_is else float("-inf")


class Waiter:
    """One thread's wait for a lease. It ends with a `lease`, a `denial` or an `error`."""

    __slots__ = (
        "__weakref__",
        "answered",
        "denial",
        "error",
        "lane_place",
        "lease",
        "owner",
        "request",
        "since",
        "times_asked",
        "until",
        "waits_for_move",
        "wake",
    )  # fmt: skip

    def __init__(self, wake: Callable[[], None], now: float, owner: object | None = None) -> None:
        # An object that lives as long as the thread's call; see `abandoned`.
        self.owner = None if owner is None else weakref.ref(owner)
        # Called when the wait is over, and when the thread should choose anew where to wait.
        self.wake = wake
        self.since = now
        self.request = 0
        self.until: float | None = None  # end of the wait; None for an answer at once
        self.lane_place = -1  # its place in the lane, -1 for none
        self.waits_for_move = False  # connections move, so the broker was not asked
        self.times_asked = 0  # requests to the broker
        self.answered = False  # the broker itself has answered and sends nothing more
        self.lease: Lease | None = None
        self.denial: Deny | None = None
        self.error: Exception | None = None

    def reset(self, now: float) -> None:
        """Start another wait: the lease that ended the last one could not be used."""
        self.since = now
        self.answered = False
        self.lease = self.denial = self.error = None

    @property
    def broker_is_done(self) -> bool:
        """Whether the broker sends nothing more to this waiter's place in the lane.

        That is so if it was asked at most once and has answered. Asked twice, the broker may queue
        the second request after its answer to the first has left.
        """
        return not self.times_asked or (
            self.times_asked == 1 and (self.answered or self.denial is not None)
        )

    @property
    def abandoned(self) -> bool:
        """Whether the thread's call has ended without a word, by an interrupt."""
        return self.owner is not None and self.owner() is None

    @property
    def is_done(self) -> bool:
        """Whether the wait is over."""
        return self.lease is not None or self.denial is not None or self.error is not None


class Closing(Struct, frozen=True):
    """A lease whose connection is to be closed, and why."""

    lease: Lease
    reason: ReleaseReason


def collected(ref: object) -> None:
    """Do nothing: the callback of `Lease.ref`.

    The garbage collector clears a weak reference with a callback before it runs finalizers. So,
    inside a finalizer, a dead `Lease.ref` tells that the connection is being collected too. From
    Python 3.14 on, references without a callback are cleared only afterwards.
    """

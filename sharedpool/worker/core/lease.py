"""What one process knows of a lease, and of a thread that waits for one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sharedpool.wire.desk import Live
from sharedpool.wire.messages import Backend, Deny, Phase, ReleaseReason, Token
from sharedpool.worker.core.callsite import Stack

HANDING_OUT_LIMIT_S = 30.0
CLOSING_LIMIT_S = 3.0


class Lease:
    """A slot this process holds, and its connection (opaque here).

    `conn` is set while it lies idle, is handed on or is being closed; once out, only `ref` knows it, so that a
    connection that its user has dropped can be seen. `arrived_at` is when this process got it open, `since` when its
    phase began, `idle_s` how long it had lain idle before. `waiter` is the one it was given to, while that thread alone
    knows of it. `deposited`: the broker has been given the socket. `needs_configure`: it came with a connection from
    another process, which has not been made this one's own yet. `fast_checkout_until`: until when a checkout may lend
    its connection as it is, neither fresh nor wrapped. `movable`: its session can be passed to another. `generation` is
    the newest that was known when it was granted. `fast_checkin`: its next checkin need not look at its key, at the
    generation, at its settings, nor whether it was taken away. `cache` is whose it is. `stack` is where it was last
    checked out (`debug_checkouts`). `connect_by`: what is not being connected by then must not be. `reached_directly`,
    `refused_with`: GRANT's `direct` and `code`. `at_close`: what its user's `close()` does in place of closing.
    `integration_state` is what an integration keeps with the session while that stays in this process. `cell` and
    `moves`: see `wire/board.py`. `live`: what came with it, if it has come in the lane. `timed`: this use is
    (`timings.py`), if it goes the fast path. `cancelled`: the broker was asked to cancel what is executed, and alone
    knows when that is over.
    """

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
        "looked_lost_since",
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
        self.token = token
        self.phase = Phase.CONNECTING
        self.since = self.arrived_at = now
        self.conn: object | None = None
        self.ref: weakref.ref[object] | None = None
        self.idle_s = 0.0
        self.backend: Backend | None = None
        self.retire_at = float("inf")
        self.connect_by = float("inf")
        self.reached_directly = False
        self.refused_with = ""
        self.deposited = False
        self.needs_configure = False
        self.fast_checkout_until = float("-inf")
        self.movable = False
        self.cell = -1
        self.timed = False
        self.live: Live | None = None
        self.cancelled = False
        self.moves = 0
        self.fast_checkin = True
        self.cache: object = None
        self.generation = 0
        self.looked_lost_since: float | None = (
            None  # `since`, when it looked lost at the last heartbeat
        )
        self.thread = 0  # identifier of the thread that has it
        self.stack: Stack = ()
        self.key: object = None
        self.at_close: Callable[[Any], None] | None = None
        self.integration_state: Any = None
        self.waiter = None if waiter is None else weakref.ref(waiter)

    def allow_fast_checkout(self, as_is: bool) -> None:
        """Note whether the next checkouts may lend the connection as it is, neither fresh nor wrapped."""
        self.fast_checkout_until = self.retire_at if as_is else float("-inf")


class Waiter:
    """One thread's wait for a lease. Its end is a `lease`, a `denial` or an `error`: `is_done` tells that it has come.

    `wake` is called then, and when the thread is to look where it waits best. `owner` is a reference to what lives as
    long as the thread's call: without it the waiter is `abandoned`.
    """

    __slots__ = (
        "__weakref__",
        "answered",
        "denial",
        "error",
        "lane_place",
        "lease",
        "only_in_lane",
        "owner",
        "request",
        "since",
        "times_asked",
        "until",
        "wake",
    )  # fmt: skip

    def __init__(self, wake: Callable[[], None], now: float, owner: object | None = None) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.wake = wake
        self.since = now
        self.request = 0
        self.until: float | None = None  # then its wait is over; None: it wants an answer at once
        self.lane_place = -1  # where it waits in the lane
        self.only_in_lane = False  # it waits there, and was asked for nowhere else
        self.times_asked = 0  # how often the broker was asked for it
        self.answered = False  # by the broker itself: nothing more comes for it
        self.lease: Lease | None = None
        self.denial: Deny | None = None
        self.error: Exception | None = None

    def reset(self, now: float) -> None:
        """Forget how the last wait has ended: what it brought could not be used."""
        self.since = now
        self.answered = False
        self.lease = self.denial = self.error = None

    @property
    def broker_is_done(self) -> bool:
        """Whether the broker sends nothing more to its place: it was asked once at most, and that is answered.

        Asked twice it may queue it anew while the answer to the first is on its way.
        """
        return not self.times_asked or (
            self.times_asked == 1 and (self.answered or self.denial is not None)
        )

    @property
    def abandoned(self) -> bool:
        """Whether its thread's call is over: an interrupt has kept it from saying so."""
        return self.owner is not None and self.owner() is None

    @property
    def is_done(self) -> bool:
        """Whether the wait is over."""
        return self.lease is not None or self.denial is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class Closing:
    """A lease whose connection is to be closed, and why."""

    lease: Lease
    reason: ReleaseReason


def collected(ref: object) -> None:
    """Do nothing.

    The garbage collector clears a reference that has a callback before it runs finalizers (from Python 3.14 on others
    only afterwards): in a finalizer a dead `Lease.ref` tells that the connection is being collected too.
    """

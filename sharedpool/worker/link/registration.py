"""One pool's registration with the broker, over the link that all pools of the process share."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from sharedpool.wire.desk import LaneInvitation
from sharedpool.wire.messages import Bye, Hello, ToBroker, ToWorker, Welcome

# Before the first WELCOME, which says how often the broker expects a heartbeat.
_FIRST_BEAT_S = 1.0
# Heartbeats are sent at whole seconds of the machine's clock, if they are rarer than this: the
# broker then wakes once for those of many processes, and most of what they cost it is to wake up.
_TOGETHER_S = 2.0


class Endpoint(Protocol):
    """The pool that a registration serves. All methods are called in the link's thread."""

    @property
    def ending(self) -> bool:
        """Whether the registration is to end once the pool holds nothing. Takes no lock."""

    def compose_hello(self) -> Hello:
        """Return the message that registers the pool."""

    def compose_bye(self) -> Bye:
        """Return the last message."""

    def beat(self) -> bool:
        """Scavenge and queue a RENEW; return True if anything is held or asked for."""

    def receive(self, message: ToWorker) -> None:
        """Handle a message."""

    def invited(self, invitation: LaneInvitation, fds: list[int]) -> None:
        """Enter the lane that these descriptors belong to. The pool owns them now."""

    def descriptors_to_watch(self) -> list[int]:
        """Return descriptors where connections may arrive for threads that wait no more.

        When one is readable, `receive_strays` is called. Takes no lock.
        """

    def receive_strays(self) -> None:
        """Handle what has arrived there."""

    def done(self) -> bool:
        """Return True if the pool is over and holds nothing. The registration ends then."""

    def registration_ended(self) -> None:
        """Handle the registration's end."""

    def unreachable(self, error: Exception) -> None:
        """Handle that the broker refuses for good, or cannot be started."""


class Registration:
    """A pool's *session* at the broker. The link's thread serves it (`link.py`)."""

    def __init__(
        self,
        process: bytes,
        channel: bytes,
        endpoint: Endpoint,
        outbox: deque[ToBroker],
        start_broker: Callable[[], None] | None,
    ) -> None:
        self.identity = process + channel  # the session's name
        self.channel = channel
        self.endpoint = endpoint
        # The cache's. To send a message, append it under the pool's lock, then wake the link.
        self.outbox = outbox
        self.start_broker = start_broker
        self.established = False  # from WELCOME until the broker falls silent
        self.trouble = "no answer from it"  # why the broker does not answer
        self.over = threading.Event()  # BYE is sent
        self.due = float("-inf")  # the time of the next HELLO or heartbeat
        self.pause_s = _FIRST_BEAT_S  # from the last heartbeat to the next
        self._beat_s = self._rest_s = _FIRST_BEAT_S

    def welcomed(self, welcome: Welcome, now: float, part: float) -> None:
        """Record that the broker knows the pool.

        The first heartbeat waits for `part` of a pause.
        """
        self.established = True
        # Often enough for the TTL, and for connections to expire in time. A session that holds
        # nothing beats less often: if it is late once, nothing is lost.
        ttl_s, often_s = welcome.ttl_ms / 1000, max(0.25, welcome.expiration_ms / 2000)
        self._beat_s, self._rest_s = min(ttl_s / 3, often_s), min(ttl_s / 2, often_s)
        self.pause_s = self._beat_s
        self.due = now + self.pause_s * part

    def beat(self, now: float) -> None:
        """Queue a heartbeat. The next one comes later if nothing is held."""
        self.pause_s = self._beat_s if self.endpoint.beat() else self._rest_s
        self.due = now + self.pause_s
        if self.pause_s >= _TOGETHER_S:
            self.due = float(int(self.due))

    def interrupted(self, trouble: str) -> None:
        """Record that the broker cannot be reached: HELLO is sent again as soon as possible."""
        self.established, self.trouble, self.due = False, trouble, float("-inf")

"""One pool's registration with the broker, over the link that it shares with the process's other pools."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from sharedpool.wire.desk import LaneInvitation
from sharedpool.wire.messages import Bye, Hello, ToBroker, ToWorker, Welcome

# Nobody has heard of the broker yet, at the first HELLO.
_FIRST_BEAT_S = 1.0


class Endpoint(Protocol):
    """What a registration serves: the pool. All of it is called in the link's thread."""

    @property
    def ending(self) -> bool:
        """Whether the registration is to end once nothing is held. Takes no lock."""

    def compose_hello(self) -> Hello:
        """Compose the registration."""

    def compose_bye(self) -> Bye:
        """Compose the last message."""

    def beat(self) -> bool:
        """Housekeeping: queue a RENEW, scavenge. Return whether anything is held or asked for."""

    def receive(self, message: ToWorker) -> None:
        """Take in a message."""

    def invited(self, invitation: LaneInvitation, fds: list[int]) -> None:
        """Take part in the lane that these descriptors, this pool's now, are of."""

    def descriptors_to_watch(self) -> list[int]:
        """Return descriptors where something may come for who waits no more: `receive_strays` then. Takes no lock."""

    def receive_strays(self) -> None:
        """Take in what has come there."""

    def done(self) -> bool:
        """Say whether the pool is over and holds nothing any more: the registration ends, and is not asked again."""

    def registration_ended(self) -> None:
        """The registration has ended."""

    def unreachable(self, error: Exception) -> None:
        """The broker refuses for good, or cannot be started."""


class Registration:
    """A pool's *session* at the broker, named by `identity`; `link.py` has the thread that serves it.

    `outbox` is the cache's: append under the pool's lock, then wake the link. `established` from WELCOME until the
    broker falls silent. `over` is set once BYE is sent. `trouble` is why there is no answer.
    """

    def __init__(
        self,
        process: bytes,
        channel: bytes,
        endpoint: Endpoint,
        outbox: deque[ToBroker],
        start_broker: Callable[[], None] | None,
    ) -> None:
        self.identity = process + channel
        self.channel = channel
        self.endpoint = endpoint
        self.outbox = outbox
        self.start_broker = start_broker
        self.established = False
        self.trouble = "no answer from it"
        self.over = threading.Event()
        self.due = float("-inf")  # the next HELLO, or the next heartbeat
        self.pause_s = _FIRST_BEAT_S  # between the last heartbeat and the next
        self._beat_s = self._rest_s = _FIRST_BEAT_S

    def welcomed(self, welcome: Welcome, now: float, part: float) -> None:
        """Note that the broker knows the pool now. `part`, of 1, of a pause is waited before the first heartbeat."""
        self.established = True
        # Often enough for the TTL, and for the broker to know what has expired soon after it has. A session that holds
        # nothing may be late once: that costs nobody anything.
        ttl_s, often_s = welcome.ttl_ms / 1000, max(0.25, welcome.expiration_ms / 2000)
        self._beat_s, self._rest_s = min(ttl_s / 3, often_s), min(ttl_s / 2, often_s)
        self.pause_s = self._beat_s
        self.due = now + self.pause_s * part

    def beat(self, now: float) -> None:
        """Have the heartbeat queued; the next one comes later where nothing is held."""
        self.pause_s = self._beat_s if self.endpoint.beat() else self._rest_s
        self.due = now + self.pause_s

    def interrupted(self, trouble: str) -> None:
        """Note that the broker cannot be reached: HELLO is said again as soon as it can."""
        self.established, self.trouble, self.due = False, trouble, float("-inf")

"""A process's links, one for each broker that it uses, and the ZeroMQ context that they share."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from sharedpool.wire.messages import ToBroker
from sharedpool.worker import greenlets
from sharedpool.worker.link.link import Link
from sharedpool.worker.link.registration import Endpoint, Registration


class SharedContext:
    """The process's ZeroMQ context, which has two threads.

    It lives from the first link to the last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._context: Any = None

    def acquire(self) -> Any:
        """Return the context for one more link."""
        with self._lock:
            if self._context is None:
                self._context = greenlets.zmq_context()
            self._users += 1
            return self._context

    def release(self) -> None:
        """Count one link less.

        With the last one, block for the rest of the sockets' LINGER at most.
        """
        with self._lock:
            self._users -= 1
            if self._users:
                return
            context, self._context = self._context, None
        context.term()


class Links:
    """One process's links. A forked child has links of its own, and leaves the parent's alone."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._links: dict[str, Link] = {}
        self._context = SharedContext()

    def have(self, address: str) -> bool:
        """Return True if there is a link to the broker at `address` already."""
        return address in self._links

    def attach(
        self,
        address: str,
        endpoint: Endpoint,
        outbox: deque[ToBroker],
        start_broker: Callable[[], None] | None,
    ) -> tuple[Link, Registration]:
        """Register `endpoint` with the broker at `address`; return the link and the registration.

        Does not block, and starts no thread: see `Link.ensure_running`.
        """
        with self._lock:
            link = self._links.get(address)
            registration = None if link is None else link.attach(endpoint, outbox, start_broker)
            if link is None or registration is None:  # none, or its thread has just ended
                link = self._links[address] = Link(address, self._context)
                registration = link.attach(endpoint, outbox, start_broker)
                assert registration is not None
            return link, registration


_links = Links()


def current() -> Links:
    """Return this process's links."""
    global _links
    if _links.pid != os.getpid():
        _links = Links()  # with new locks, since a thread of the parent may have held the old ones
    return _links

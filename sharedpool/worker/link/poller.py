"""A poll of the link's ZeroMQ socket, its wakeup, and a changing set of descriptors."""

from __future__ import annotations

import math
import time
from types import ModuleType
from typing import Any

import zmq

from sharedpool.descriptors.wakeup import Wakeup


class Poller:
    """Polls for input. `library` is pyzmq, or its replacement for gevent."""

    def __init__(self, library: ModuleType, wakeup: Wakeup, socket: Any = None) -> None:
        self._poller: Any = library.Poller()
        self._poller.register(wakeup, zmq.POLLIN)
        if socket is not None:
            self._poller.register(socket, zmq.POLLIN)
        self._fds: set[int] = set()

    def wait(self, fds: set[int], until: float) -> set[Any]:
        """Wait for input on `fds` as well; return what is readable: descriptors, and the socket."""
        for fd in self._fds - fds:
            self._poller.unregister(fd)
        for fd in fds - self._fds:
            self._poller.register(fd, zmq.POLLIN)
        self._fds = fds
        limit_ms = max(0, math.ceil((until - time.monotonic()) * 1000))
        return {source for source, _ in self._poller.poll(limit_ms)}

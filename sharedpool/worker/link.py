"""A pool's line to the broker: one I/O thread that owns the ZeroMQ socket.

It registers (HELLO) and does so again when the broker falls silent, sends what the cache has decided, keeps the
heartbeat, and hands every message to the pool. Whatever the broker asks for happens in this thread, so that a process
that never calls its pool again still gives back what is recalled or expired.
"""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from sharedpool.errors import ProtocolError, SharedPoolError
from sharedpool.spare import FOR_A_CONTEXT, FOR_A_SOCKET, make_sure_of
from sharedpool.wire.codec import decode_to_worker, encode
from sharedpool.wire.messages import Bye, Hello, Reject, ToBroker, ToWorker, Welcome
from sharedpool.worker import green
from sharedpool.worker.bell import Bell

if TYPE_CHECKING:
    from sharedpool.worker.booth import Booth, Booths

logger = logging.getLogger("sharedpool.worker")

_HELLO_RETRY_S = 1.0
_RESTART_AFTER_S = 3.0  # without a WELCOME: see whether the automatic broker must be started
_FLUSH_LIMIT_S = 1.0
_JITTER_S = 0.05


class Endpoint(Protocol):
    """What the link serves: the pool."""

    def hello(self) -> Hello:
        """Compose the registration."""

    def bye(self) -> Bye:
        """Compose the last message."""

    def beat(self) -> bool:
        """Housekeeping: queue a RENEW, scavenge. Return whether anything is held or asked for."""

    def receive(self, message: ToWorker) -> None:
        """Take in a message."""

    @property
    def line(self) -> socket.socket | None:
        """Something that becomes readable when the broker is gone."""

    @property
    def booths(self) -> Booths:
        """Lines to the desk, of which some are to be read by the link."""

    def read(self, booth: Booth) -> None:
        """Read one of those."""

    def done(self) -> bool:
        """Say whether the pool is over and holds nothing any more: the link ends, and is not asked again."""

    def ended(self) -> None:
        """The link's thread ends."""

    def unreachable(self, error: Exception) -> None:
        """The broker refuses for good, or cannot be started."""


class Link:
    """The I/O thread of one pool. `outbox` is the cache's: append under the pool's lock, then `wake`."""

    def __init__(
        self, endpoint: Endpoint, address: str, outbox: deque[ToBroker], start_broker: Callable[[], None] | None
    ) -> None:
        self._endpoint = endpoint
        self.address = address
        self._outbox = outbox
        self._start_broker = start_broker
        self.established = False
        self.heard_at = float("-inf")
        self.epoch = 0
        self.trouble = "no answer from it"
        self._ttl_s = 15.0
        self._beat_s = self._rest_s = 1.0
        # Kept for life: the broker knows the session, and what it holds, by it.
        self.identity = b"w" + os.urandom(15)
        self._bell = Bell()
        self._claim = threading.Lock()
        self.running = False
        self._over = False
        self._thread: Any = None  # or greenlet
        self._zmq: ModuleType = zmq

    @property
    def is_here(self) -> bool:
        """Whether this is the link's own thread."""
        return self._thread is green.current_thread()

    def start(self) -> None:
        """Start the thread. Called again after an interrupt, it starts a second one only if the first never ran."""
        green.start_thread(self._run, "sharedpool-link")

    def wake(self) -> None:
        """Have the outbox sent. Takes no lock: safe in a finalizer."""
        self._bell.ring()

    def close(self) -> None:
        """Let the thread end, saying BYE, as soon as the pool holds nothing; waits for it at most a second."""
        self.wake()
        thread = self._thread
        if thread is not None and not self.is_here:
            thread.join(_FLUSH_LIMIT_S + 0.5)

    def disown(self) -> None:
        """In a forked child: let go of the parent's line. Its thread does not exist here, unless it is a greenlet."""
        self._bell.close()
        if self._thread is not None and not isinstance(self._thread, threading.Thread):
            self._thread.kill(block=False)  # before it can touch the parent's ZeroMQ socket

    # --- the thread

    def _is_over(self) -> bool:
        """Say whether this link is to end: once it is, it remains so, whatever the pool holds by another link then."""
        self._over = self._over or self._endpoint.done()
        return self._over

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        self._thread = green.current_thread()
        self.running = True
        self._zmq = green.zmq_library()
        context = self._zmq.Context()
        try:
            while not self._is_over():
                try:
                    self._session(context)
                except (SharedPoolError, OSError, zmq.ZMQError) as error:
                    self._fail(error)
                except Exception as error:
                    logger.exception("bug: the link to %s has failed", self.address)
                    self._fail(error)
        finally:
            self.established = False
            self._endpoint.ended()
            context.term()
            self._bell.close()

    def _fail(self, error: Exception) -> None:
        """Tell those who wait, and try again a little later."""
        self.trouble = str(error) or type(error).__name__
        self._endpoint.unreachable(error)
        self._pause(random.uniform(0.5, 1.5))

    def _session(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Be registered once: from HELLO until the broker falls silent or the pool is over."""
        make_sure_of(FOR_A_SOCKET if self.epoch else FOR_A_CONTEXT, "the line to the broker")
        if self._start_broker is not None:
            self._start_broker()
        dealer = context.socket(zmq.DEALER)
        try:
            dealer.setsockopt(zmq.IDENTITY, self.identity)
            dealer.setsockopt(zmq.LINGER, int(_FLUSH_LIMIT_S * 1000))
            dealer.setsockopt(zmq.IPV6, 1)
            dealer.setsockopt(zmq.RECONNECT_IVL, 20)
            dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
            dealer.connect(self.address)
            self._serve(dealer)
        finally:
            if not self.established:
                dealer.setsockopt(zmq.LINGER, 0)  # unanswered HELLOs: the next session says its own
            self.established = False
            dealer.close()

    def _serve(self, dealer: zmq.Socket[bytes]) -> None:
        poller = self._zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        started = time.monotonic()
        hello_at = beat_at = started
        pause_s = self._beat_s
        while not self._is_over():
            now = time.monotonic()
            if not self.established and now >= hello_at:
                dealer.send(encode(self._endpoint.hello()))
                hello_at = now + _HELLO_RETRY_S * random.uniform(0.8, 1.2)
                if now - started > _RESTART_AFTER_S:
                    return  # it may have left just when we came; nor may HELLOs pile up for one that is away
            if self.established and now >= beat_at:
                if now - self.heard_at > 2.5 * pause_s + 1.0:
                    logger.warning("the broker at %s is silent: registering again", self.address)
                    self.trouble = "it has fallen silent"
                    return
                pause_s = self._beat_s if self._endpoint.beat() else self._rest_s
                beat_at = now + pause_s
            self._flush(dealer)
            due = beat_at if self.established else hello_at
            line = self._endpoint.line if self.established else None
            unsettled = list(self._endpoint.booths.unsettled.values())
            watched = [*unsettled, *([] if line is None else [line])]
            for each in watched:
                poller.register(each, zmq.POLLIN)
            try:
                ready = dict(poller.poll(_ms_until(due)))
            finally:
                for each in watched:
                    poller.unregister(each)
            for booth in unsettled:
                if booth.fileno() in ready:
                    self._endpoint.read(booth)
            if line is not None and line.fileno() in ready:
                self.trouble = "it has ended"
                self._pause(random.uniform(0.0, _JITTER_S))  # not all at once
                return
            if self._bell.fileno() in ready:
                self._bell.hush()
            if dealer in ready:
                was = self.established
                self._receive(dealer)
                if self.established and not was:
                    pause_s = self._beat_s
                    beat_at = time.monotonic() + pause_s * random.uniform(0.5, 1.0)
        self._flush(dealer)
        if self.established:
            dealer.send(encode(self._endpoint.bye()))

    def _receive(self, dealer: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frame = dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_to_worker(frame)
            except ProtocolError as error:
                logger.warning("dropped a message from the broker: %s", error)
                continue
            self.heard_at = time.monotonic()
            if isinstance(message, Reject):
                if message.fatal:
                    raise SharedPoolError(message.reason)
                self.established = False  # a new broker: HELLO again
                dealer.send(encode(self._endpoint.hello()))
            elif isinstance(message, Welcome) and message.epoch < self.epoch:
                logger.warning("dropped a late word from broker %d, of before broker %d", message.epoch, self.epoch)
            elif isinstance(message, Welcome):
                self._welcomed(message)
                self._endpoint.receive(message)
            elif self.established:
                self._endpoint.receive(message)
            # Else said before the HELLO that is under way, perhaps by a former broker: it knows by now what is held.

    def _welcomed(self, welcome: Welcome) -> None:
        self.established = True
        self.epoch = welcome.epoch
        self._ttl_s = welcome.ttl_ms / 1000
        # Often enough for the TTL, and for the broker to know what has expired soon after it has. A session that holds
        # nothing may be late once: that costs nobody anything.
        often_s = max(0.25, welcome.expiration_ms / 2000)
        self._beat_s, self._rest_s = min(self._ttl_s / 3, often_s), min(self._ttl_s / 2, often_s)

    def _flush(self, dealer: zmq.Socket[bytes]) -> None:
        while self.established and self._outbox:
            try:
                dealer.send(encode(self._outbox[0]), zmq.NOBLOCK)
            except zmq.Again:
                return  # the broker does not read: RENEW will tell it all
            self._outbox.popleft()

    def _pause(self, seconds: float) -> None:
        poller = self._zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        deadline = time.monotonic() + seconds
        while not self._is_over() and time.monotonic() < deadline:
            if poller.poll(_ms_until(deadline)):
                self._bell.hush()


def _ms_until(when: float) -> int:
    return max(0, math.ceil((when - time.monotonic()) * 1000))

"""A process's link to one broker: one I/O thread for all pools that use the broker.

The thread

- registers every pool (HELLO), and again when the broker falls silent or ends;
- sends what the pools' caches have decided, and the heartbeats;
- hands every message to the pool that it is for.

What the broker asks for is done in this thread. So a process that never calls its pools again still
gives back connections that are recalled or have expired.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any

import zmq
from msgspec import structs

from sharedpool.descriptors.available import FOR_A_CONTEXT, FOR_A_SOCKET, require
from sharedpool.descriptors.timer import Timer
from sharedpool.descriptors.wakeup import Wakeup
from sharedpool.errors import ProtocolError, SharedPoolError
from sharedpool.postgres.buffer_probe import Probe
from sharedpool.wire.channel import PROCESS_PREFIX, channel_number
from sharedpool.wire.codec import decode_to_worker
from sharedpool.wire.messages import Reject, ToBroker, ToWorker, Welcome
from sharedpool.worker import greenlets
from sharedpool.worker.connection.closing import FINALIZING_S, close_ownerless
from sharedpool.worker.link.dealer import LINGER_S, Context, Dealer
from sharedpool.worker.link.desk_line import DeskLine
from sharedpool.worker.link.poller import Poller
from sharedpool.worker.link.registration import Endpoint, Registration
from sharedpool.worker.logs import logger

_HELLO_RETRY_S = 1.0
_RESTART_AFTER_S = 3.0  # without a WELCOME: an automatic broker may have to be started
_LEAVE_LIMIT_S = LINGER_S + 0.5
_JITTER_S = 0.05
_CHECK_EVERY_S = 0.5  # for descriptors that interrupts have left open


class _BrokerGone(Exception):
    """The broker is gone, or does not answer. The text says how that shows; "" if it is unknown."""


class Link:
    """The I/O thread for one broker. It ends with the last registration."""

    def __init__(self, address: str, context: Context) -> None:
        self.address = address
        self.desk = DeskLine()
        self.heard_at = float("-inf")
        self.epoch = 0  # of the broker that sent the newest WELCOME
        # It never changes: the broker knows the sessions, and what they hold, by it.
        self.identity = PROCESS_PREFIX + os.urandom(15)
        self._context = context
        self._wakeup = Wakeup()
        self.timer: Timer | None = None  # made with the first lane
        # Guards the next three; no method of an endpoint is called under it.
        self._lock = threading.Lock()
        self._registrations: dict[bytes, Registration] = {}
        self._count = 0
        self._over = False
        self._start_lock = threading.Lock()
        self._running = False
        # A registration has been answered over the present connection.
        self._established = False
        # False until the thread has looked for work once: until then nothing has to wake it.
        self._needs_waking = False
        self._check_at = 0.0
        self._attempts = 0
        # `leave` has timed out, and this thread has not run `_sweep` since.
        self._timed_out = False
        self._thread: Any = None  # a thread or a greenlet
        self._zmq: ModuleType = zmq
        self._nonce = 0  # of the HELLOs over the present connection

    @property
    def is_own_thread(self) -> bool:
        """Whether this is the link's own thread."""
        return self._thread is greenlets.current_thread()

    def attach(
        self, endpoint: Endpoint, outbox: deque[ToBroker], start_broker: Callable[[], None] | None
    ) -> Registration | None:
        """Add a pool, which the thread then registers. Return None if the link is over."""
        with self._lock:
            if self._over:
                return None
            self._count += 1
            channel = channel_number(self._count)
            registration = Registration(self.identity, channel, endpoint, outbox, start_broker)
            self._registrations[registration.channel] = registration
            return registration

    def make_timer(self) -> Timer | None:
        """Return the timer that makes the thread look at all pools; None if the system has none."""
        if self.timer is None:
            with contextlib.suppress(OSError):
                self.timer = Timer()
        return self.timer

    def ensure_running(self) -> None:
        """Start the thread unless it runs.

        An interrupt may hide that it was started. A second thread ends at once.
        """
        if not self._running:
            greenlets.start_thread(self._run, "sharedpool-link")

    def wake(self) -> None:
        """Have the outboxes sent. Takes no lock, so that a finalizer may call it."""
        if self._needs_waking:
            self._wakeup.wake()

    def leave(self, registration: Registration) -> None:
        """End a registration as soon as its pool holds nothing. Blocks for at most 1.5 seconds.

        With the last registration the thread ends, and is waited for too.
        """
        self.wake()
        thread = self._thread
        if thread is None or self.is_own_thread:
            return
        deadline = time.monotonic() + (0.0 if self._timed_out else _LEAVE_LIMIT_S)
        if not registration.over.wait(max(0.0, deadline - time.monotonic())):
            # A program that ends with many pools must not wait for each of them.
            self._timed_out = True
        elif self._over:
            thread.join(max(0.0, deadline - time.monotonic()))

    def disown(self) -> None:
        """Close the parent's descriptors in a forked child.

        The parent's thread does not exist here, unless it is a greenlet.
        """
        self._wakeup.close()
        if self.timer is not None:
            self.timer.close()
        self.desk.disown()
        if self._thread is not None and not isinstance(self._thread, threading.Thread):
            self._thread.kill(block=False)  # before it can touch the parent's ZeroMQ socket

    # --- the thread

    def _run(self) -> None:
        if not self._start_lock.acquire(blocking=False):
            return
        with logger.kept():
            self._run_once()

    def _run_once(self) -> None:
        self._thread = greenlets.current_thread()
        self._running = True
        self._zmq = greenlets.zmq_library()
        context = self._context.acquire()
        try:
            while self._sweep(None):
                try:
                    self._start_broker()
                    self._connect(context)
                except (SharedPoolError, OSError, zmq.ZMQError) as error:
                    self._fail(error)
                except Exception as error:
                    logger.exception("bug: the link to %s has failed", self.address)
                    self._fail(error)
        finally:
            self._close()
            self._context.release()

    def _close(self) -> None:
        """End the link: pools that attach from now on need another one."""
        with self._lock:
            self._over = True
            left = list(self._registrations.values())
            self._registrations.clear()
        for registration in left:
            registration.established = False
            registration.endpoint.registration_ended()
            registration.over.set()
        self.desk.close()
        self._wakeup.close()
        if self.timer is not None:
            self.timer.close()
        Probe.close_kept()
        if close_ownerless():  # a last time, as no heartbeat follows
            time.sleep(FINALIZING_S)
            close_ownerless()

    def _active(self) -> list[Registration]:
        with self._lock:
            return list(self._registrations.values())

    def _sweep(self, dealer: Dealer | None) -> list[Registration]:
        """End the registrations whose pools are over; return the others.

        With none the link is over.
        """
        self._timed_out = False
        ended = False
        living = self._active()
        for registration in living:
            endpoint = registration.endpoint
            if not endpoint.ending or not endpoint.done():
                continue
            if registration.established and dealer is not None:
                self._flush(registration, dealer)
                dealer.send(registration.channel, endpoint.compose_bye())
            registration.established = False
            with self._lock:
                del self._registrations[registration.channel]
                self._over = not self._registrations
            endpoint.registration_ended()
            registration.over.set()
            ended = True
        return self._active() if ended else living

    def _start_broker(self) -> None:
        """Start the automatic broker with one pool's settings.

        If that fails, the next attempt uses another pool's.
        """
        starters = [each.start_broker for each in self._active() if each.start_broker is not None]
        if starters:
            self._attempts += 1
            starters[self._attempts % len(starters)]()

    def _fail(self, error: Exception) -> None:
        """Fail the waiting threads, and pause before the next attempt."""
        for registration in self._active():
            registration.interrupted(str(error) or type(error).__name__)
            registration.endpoint.unreachable(error)
        self._pause(random.uniform(0.5, 1.5))

    def _connect(self, context: Any) -> None:
        """Connect, and serve the registrations until the broker is gone or the link is over."""
        require(FOR_A_SOCKET if self.epoch else FOR_A_CONTEXT, "the socket to the broker")
        dealer = Dealer(context, self.address, self.identity)
        self._nonce = random.getrandbits(62)
        try:
            self._serve(dealer)
        except _BrokerGone as error:
            for registration in self._active():
                registration.interrupted(str(error) or registration.trouble)
        finally:
            # Unanswered HELLOs are dropped: the next connection sends its own.
            linger, self._established = self._established, False
            dealer.close(linger=linger)

    def _serve(self, dealer: Dealer) -> None:
        """Serve the registrations until the link is over. Raise `_BrokerGone`."""
        poller = Poller(self._zmq, self._wakeup, dealer.socket)
        started = time.monotonic()
        self._needs_waking = True
        while living := self._sweep(dealer):
            now = time.monotonic()
            for registration in living:
                if registration.established:
                    if now >= registration.due:
                        self._beat(registration, now)
                    self._flush(registration, dealer)
                elif now >= registration.due:
                    self._send_hello(registration, dealer, now)
                    if not self._established and now - started > _RESTART_AFTER_S:
                        # The broker may have ended just before we connected. Nor may HELLOs pile
                        # up for a broker that is away.
                        raise _BrokerGone
            self._wait(poller, dealer, min(each.due for each in living))

    def _beat(self, registration: Registration, now: float) -> None:
        """Queue a heartbeat. Raise `_BrokerGone` if the broker has been silent for too long."""
        if now - self.heard_at > 2.5 * registration.pause_s + 1.0:
            logger.warning("no answer from the broker at %s: registering again", self.address)
            self._pause(random.uniform(0.0, _JITTER_S))  # heartbeats of all workers come together
            raise _BrokerGone("it has fallen silent")
        registration.beat(now)
        if now >= self._check_at:
            self._check_at = now + _CHECK_EVERY_S
            close_ownerless()

    def _send_hello(self, registration: Registration, dealer: Dealer, now: float) -> None:
        hello = structs.replace(registration.endpoint.compose_hello(), nonce=self._nonce)
        dealer.send(registration.channel, hello)
        registration.due = now + _HELLO_RETRY_S * random.uniform(0.8, 1.2)

    def _wait(self, poller: Poller, dealer: Dealer, due: float) -> None:
        """Wait until `due` for events and handle them. Raise `_BrokerGone` if the broker ends."""
        line = self.desk.line
        line_fd = -1 if line is None or not self._established else line.fileno()
        endpoint_by_fd = {
            fd: each.endpoint
            for each in self._active()
            for fd in each.endpoint.descriptors_to_watch()
        }
        timer_fd = -1 if self.timer is None else self.timer.fileno()
        ready = poller.wait({*endpoint_by_fd, line_fd, timer_fd} - {-1}, due)
        for endpoint in {endpoint_by_fd[fd] for fd in endpoint_by_fd.keys() & ready}:
            endpoint.receive_strays()
        if line_fd in ready:
            self._read_line()
        if self._wakeup.fileno() in ready:
            self._wakeup.clear()
        if self.timer is not None and timer_fd in ready:
            self.timer.clear()
            for each in self._active():
                each.endpoint.receive_strays()
        if dealer.socket in ready:
            self._receive(dealer)

    def _read_line(self) -> None:
        """Read from the desk's line. Raise `_BrokerGone` if the broker has ended."""
        got = self.desk.read()
        if got is None:
            self.desk.close()
            self._pause(random.uniform(0.0, _JITTER_S))  # workers must not all return at once
            raise _BrokerGone("it has ended")
        invitation, fds = got
        if invitation is not None:
            with self._lock:
                registration = self._registrations.get(invitation.session[len(self.identity) :])
            if registration is None:
                for fd in fds:
                    os.close(fd)
            else:
                registration.endpoint.invited(invitation, fds)

    def _receive(self, dealer: Dealer) -> None:
        for channel, body in dealer.receive():
            with self._lock:
                registration = self._registrations.get(channel)
            if registration is None:
                continue  # it has said BYE
            try:
                message = decode_to_worker(body)
            except ProtocolError as error:
                logger.warning("dropped a message from the broker: %s", error)
                continue
            self.heard_at = time.monotonic()
            self._handle(registration, message, dealer)

    def _handle(self, registration: Registration, message: ToWorker, dealer: Dealer) -> None:
        endpoint = registration.endpoint
        if isinstance(message, Reject):
            registration.established = False
            if message.fatal:
                registration.trouble = message.reason
                registration.due = self.heard_at + random.uniform(0.5, 1.5)
                endpoint.unreachable(SharedPoolError(message.reason))
            else:
                self._send_hello(registration, dealer, self.heard_at)  # a new broker
        elif isinstance(message, Welcome) and self._is_late(message):
            logger.warning(
                "dropped a late WELCOME from broker %d: broker %d has followed it",
                message.epoch,
                self.epoch,
            )
        elif isinstance(message, Welcome):
            if message.epoch != self.epoch or self.desk.line is None:
                self.desk.open(message.desk, self.identity)
            self.epoch, self._established = message.epoch, True
            registration.welcomed(message, self.heard_at, random.uniform(0.5, 1.0))
            endpoint.receive(message)
        elif registration.established:
            endpoint.receive(message)
        # Else the message was sent before the HELLO that is under way, perhaps by a former broker.
        # After that HELLO the broker knows what is held, and repeats every message that is still
        # valid.

    def _is_late(self, welcome: Welcome) -> bool:
        """Return True if a WELCOME is from a former broker.

        A lower epoch alone does not prove that: a broker that has lost its files starts with an
        epoch from the clock. The first broker that answers over this connection is the present one.
        """
        return welcome.epoch < self.epoch and (self._established or welcome.nonce != self._nonce)

    def _flush(self, registration: Registration, dealer: Dealer) -> None:
        """Send the outbox. What does not fit is sent later, or replaced by the next RENEW."""
        outbox = registration.outbox
        while registration.established and outbox and dealer.send(registration.channel, outbox[0]):
            outbox.popleft()

    def _pause(self, seconds: float) -> None:
        """Wait, and end registrations meanwhile."""
        poller = Poller(self._zmq, self._wakeup)
        deadline = time.monotonic() + seconds
        self._needs_waking = True
        while self._sweep(None) and time.monotonic() < deadline:
            if poller.wait(set(), deadline):
                self._wakeup.clear()

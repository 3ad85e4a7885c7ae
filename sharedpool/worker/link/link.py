"""A process's line to one broker: one I/O thread that owns the ZeroMQ socket, for all pools that use this broker.

It registers every pool (HELLO) and does so again when the broker falls silent, sends what their caches have decided,
keeps the heartbeat, and hands every message to the pool that it is for. Whatever the broker asks for happens in this
thread, so that a process that never calls its pools again still gives back what is recalled or expired.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import zmq
from msgspec import structs

from sharedpool.descriptors.available import FOR_A_CONTEXT, FOR_A_SOCKET, require
from sharedpool.descriptors.timer import Timer
from sharedpool.descriptors.wakeup import Wakeup
from sharedpool.errors import ProtocolError, SharedPoolError
from sharedpool.postgres import libpq
from sharedpool.wire.channel import PROCESS_PREFIX, add_channel, channel_number, split_channel
from sharedpool.wire.codec import decode_to_worker, encode
from sharedpool.wire.messages import Reject, ToBroker, ToWorker, Welcome
from sharedpool.worker import greenlets
from sharedpool.worker.connection.closing import FINALIZING_S, close_ownerless
from sharedpool.worker.link.desk_line import DeskLine
from sharedpool.worker.link.registration import Endpoint, Registration
from sharedpool.worker.logs import logger

_HELLO_RETRY_S = 1.0
_RESTART_AFTER_S = 3.0  # without a WELCOME: see whether the automatic broker must be started
_FLUSH_LIMIT_S = 1.0
_JITTER_S = 0.05
_POLLIN = int(zmq.POLLIN)  # an enumeration's own `&` takes a microsecond
_CHECK_EVERY_S = 0.5  # for what interrupts have left behind


class Context(Protocol):
    """Where the link has its ZeroMQ context from (`links.SharedContext`)."""

    def acquire(self) -> Any:
        """Return the context, for one more link."""

    def release(self) -> None:
        """Have one link less."""


class Link:
    """The I/O thread for one broker, with the lines to its desk. It ends with the last registration."""

    def __init__(self, address: str, context: Context) -> None:
        self.address = address
        self.desk = DeskLine()
        self.heard_at = float("-inf")
        self.epoch = 0
        # Kept for life: the broker knows the sessions, and what they hold, by it.
        self.identity = PROCESS_PREFIX + os.urandom(15)
        self._context = context
        self._wakeup = Wakeup()
        self.timer: Timer | None = None  # made with the first lane
        # Guards the three below; no method of an endpoint is called under it.
        self._lock = threading.Lock()
        self._registrations: dict[bytes, Registration] = {}
        self._count = 0
        self._over = False
        self._start_lock = threading.Lock()
        self._running = False
        self._established = False
        self._is_waiting = (
            False  # else its thread has yet to look for the first time what there is to do
        )
        self._watched: set[int] = set()  # descriptors, with the bell and ZeroMQ's
        self._check_at = 0.0
        self._attempts = 0
        self._timed_out = False  # it was waited for in vain, and has not come round since
        self._thread: Any = None  # or greenlet
        self._zmq: ModuleType = zmq
        self._nonce = 0  # of this line's HELLOs

    @property
    def is_here(self) -> bool:
        """Whether this is the link's own thread."""
        return self._thread is greenlets.current_thread()

    def attach(
        self, endpoint: Endpoint, outbox: deque[ToBroker], start_broker: Callable[[], None] | None
    ) -> Registration | None:
        """Register a pool, as soon as the thread gets to it; None when the link is over."""
        with self._lock:
            if self._over:
                return None
            self._count += 1
            channel = channel_number(self._count)
            registration = Registration(self.identity, channel, endpoint, outbox, start_broker)
            self._registrations[registration.channel] = registration
            return registration

    def make_timer(self) -> Timer | None:
        """Return what wakes the link's thread at a later time, to look at all pools; None where there is none."""
        if self.timer is None:
            with contextlib.suppress(OSError):
                self.timer = Timer()
        return self.timer

    def ensure_running(self) -> None:
        """Start the thread, unless it runs. Called again after an interrupt, it starts no second one that goes on."""
        if not self._running:
            greenlets.start_thread(self._run, "sharedpool-link")

    def wake(self) -> None:
        """Have the outboxes sent. Takes no lock: safe in a finalizer."""
        if self._is_waiting:
            self._wakeup.wake()

    def leave(self, registration: Registration) -> None:
        """Let a registration end, saying BYE, as soon as its pool holds nothing; waits for it at most 1.5 seconds.

        With the last one the thread ends: that is waited for, too.
        """
        self.wake()
        thread = self._thread
        if thread is None or self.is_here:
            return
        deadline = time.monotonic() + (0.0 if self._timed_out else _FLUSH_LIMIT_S + 0.5)
        if not registration.over.wait(max(0.0, deadline - time.monotonic())):
            self._timed_out = (
                True  # a program that ends with many pools does not wait for each of them
            )
        elif self._over:
            thread.join(max(0.0, deadline - time.monotonic()))

    def disown(self) -> None:
        """In a forked child: let go of the parent's lines. Its thread does not exist here, unless it is a greenlet."""
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
        """End: whoever attaches from now on does so to another link."""
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
        libpq.Probe.close_kept()
        if close_ownerless():  # nobody looks again
            time.sleep(FINALIZING_S)
            close_ownerless()

    def _active(self) -> list[Registration]:
        with self._lock:
            return list(self._registrations.values())

    def _sweep(self, dealer: Any) -> list[Registration]:
        """End the registrations whose pools are over; return those that go on. Without any the link is over."""
        self._timed_out = False
        ended = False
        living = self._active()
        for registration in living:
            endpoint = registration.endpoint
            if not endpoint.ending or not endpoint.done():
                continue
            if registration.established and dealer is not None:
                self._flush(registration, dealer)
                self._send(registration, dealer, endpoint.compose_bye())
            registration.established = False
            with self._lock:
                del self._registrations[registration.channel]
                self._over = not self._registrations
            endpoint.registration_ended()
            registration.over.set()
            ended = True
        return self._active() if ended else living

    def _start_broker(self) -> None:
        """Have the automatic broker started with one pool's settings; where those fail, another's are tried next."""
        starters = [each.start_broker for each in self._active() if each.start_broker is not None]
        if starters:
            self._attempts += 1
            starters[self._attempts % len(starters)]()

    def _fail(self, error: Exception) -> None:
        """Tell those who wait, and try again a little later."""
        for registration in self._active():
            registration.interrupted(str(error) or type(error).__name__)
            registration.endpoint.unreachable(error)
        self._pause(random.uniform(0.5, 1.5))

    def _connect(self, context: Any) -> None:
        """Be connected once: until the broker falls silent or the link is over."""
        require(FOR_A_SOCKET if self.epoch else FOR_A_CONTEXT, "the line to the broker")
        dealer = greenlets.zmq_dealer(context)
        self._nonce = random.getrandbits(62)
        try:
            dealer.set(zmq.IDENTITY, self.identity)
            dealer.set(zmq.LINGER, int(_FLUSH_LIMIT_S * 1000))
            dealer.set(zmq.IPV6, 1)
            dealer.set(zmq.RECONNECT_IVL, 20)
            dealer.set(zmq.RECONNECT_IVL_MAX, 500)
            dealer.connect(self.address)
            trouble = self._serve(dealer)
            for registration in self._active():
                registration.interrupted(trouble or registration.trouble)
        finally:
            if not self._established:
                dealer.set(zmq.LINGER, 0)  # unanswered HELLOs: the next connection says its own
            self._established = False
            dealer.close()

    def _serve(self, dealer: Any) -> str:
        """Serve the registrations until the broker is gone, and return why it is ("": unknown), or the link is over."""
        poller = self._zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        self._watched = set()
        started = time.monotonic()
        self._is_waiting = True
        while living := self._sweep(dealer):
            now = time.monotonic()
            for registration in living:
                if registration.established:
                    if now >= registration.due and not self._beat(registration, now):
                        return "it has fallen silent"
                    self._flush(registration, dealer)
                elif now >= registration.due:
                    self._send_hello(registration, dealer, now)
                    if not self._established and now - started > _RESTART_AFTER_S:
                        return ""  # it may have left just when we came; nor may HELLOs pile up for one that is away
            if not self._wait(poller, dealer, min(each.due for each in living)):
                self.desk.close()
                self._pause(random.uniform(0.0, _JITTER_S))  # not all at once
                return "it has ended"
        return ""

    def _beat(self, registration: Registration, now: float) -> bool:
        """Queue a heartbeat, unless the broker has not answered for too long: then return False."""
        if now - self.heard_at > 2.5 * registration.pause_s + 1.0:
            logger.warning("the broker at %s is silent: registering again", self.address)
            return False
        registration.beat(now)
        if now >= self._check_at:
            self._check_at = now + _CHECK_EVERY_S
            close_ownerless()
        return True

    def _send_hello(self, registration: Registration, dealer: Any, now: float) -> None:
        self._send(
            registration,
            dealer,
            structs.replace(registration.endpoint.compose_hello(), nonce=self._nonce),
        )
        registration.due = now + _HELLO_RETRY_S * random.uniform(0.8, 1.2)

    def _wait(self, poller: Any, dealer: Any, due: float) -> bool:
        """Wait for news and take it in; return False when the line to the desk tells that the broker has ended."""
        line = -1 if self.desk.line is None or not self._established else self.desk.line.fileno()
        wait_sockets = {
            fd: each.endpoint
            for each in self._active()
            for fd in each.endpoint.descriptors_to_watch()
        }
        timer = -1 if self.timer is None else self.timer.fileno()
        watched = {*wait_sockets, line, timer} - {-1}
        for fd in self._watched - watched:
            poller.unregister(fd)
        for fd in watched - self._watched:
            poller.register(fd, zmq.POLLIN)
        self._watched = watched
        ready = dict(poller.poll(_ms_until(due)))
        for endpoint in {wait_sockets[fd] for fd in wait_sockets.keys() & ready.keys()}:
            endpoint.receive_strays()
        if line in ready and not self._read_line():
            return False
        if self._wakeup.fileno() in ready:
            self._wakeup.clear()
        if self.timer is not None and timer in ready:
            self.timer.clear()
            for each in self._active():
                each.endpoint.receive_strays()
        if dealer in ready:
            self._receive(dealer)
        return True

    def _read_line(self) -> bool:
        """Read what came from the desk; return False when the broker has gone."""
        got = self.desk.read()
        if got is None:
            return False
        invitation, fds = got
        if invitation is not None:
            with self._lock:
                registration = self._registrations.get(invitation.session[len(self.identity) :])
            if registration is None:
                for fd in fds:
                    os.close(fd)
            else:
                registration.endpoint.invited(invitation, fds)
        return True

    def _receive(self, dealer: Any) -> None:
        while dealer.get(zmq.EVENTS) & _POLLIN:
            try:
                frame = dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            channel, body = split_channel(frame)
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
            self._take_in(registration, message, dealer)

    def _take_in(self, registration: Registration, message: ToWorker, dealer: Any) -> None:
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
                "dropped a late word from broker %d, of before broker %d", message.epoch, self.epoch
            )
        elif isinstance(message, Welcome):
            if message.epoch != self.epoch or self.desk.line is None:
                self.desk.open(message.desk, self.identity)
            self.epoch, self._established = message.epoch, True
            registration.welcomed(message, self.heard_at, random.uniform(0.5, 1.0))
            endpoint.receive(message)
        elif registration.established:
            endpoint.receive(message)
        # Else said before the HELLO that is under way, perhaps by a former broker: it knows by now what is held.

    def _is_late(self, welcome: Welcome) -> bool:
        """Say whether a WELCOME is a former broker's.

        A lower number alone does not tell: a broker that has lost its files begins with what the clock says. One that
        answers on this line, where nobody has yet, is there now.
        """
        return welcome.epoch < self.epoch and (self._established or welcome.nonce != self._nonce)

    def _send(self, registration: Registration, dealer: Any, message: ToBroker) -> bool:
        """Send a message; return whether there was room for it."""
        try:
            dealer.send(add_channel(registration.channel, encode(message)), zmq.NOBLOCK)
        except zmq.Again:
            return False  # the broker does not read: RENEW will tell it all
        return True

    def _flush(self, registration: Registration, dealer: Any) -> None:
        outbox = registration.outbox
        while registration.established and outbox and self._send(registration, dealer, outbox[0]):
            outbox.popleft()

    def _pause(self, seconds: float) -> None:
        poller = self._zmq.Poller()
        poller.register(self._wakeup, zmq.POLLIN)
        deadline = time.monotonic() + seconds
        self._is_waiting = True
        while self._sweep(None) and time.monotonic() < deadline:
            if poller.poll(_ms_until(deadline)):
                self._wakeup.clear()


def _ms_until(when: float) -> int:
    return max(0, math.ceil((when - time.monotonic()) * 1000))

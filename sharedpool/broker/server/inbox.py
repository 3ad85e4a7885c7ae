"""Read the messages of workers and commands, and hand each to the ledger or the admin requests."""

from __future__ import annotations

import socket
import time

from msgspec import structs

from sharedpool.broker.core.ledger import Ledger
from sharedpool.broker.core.sessions import version_mismatch_text
from sharedpool.broker.server.admin_requests import AdminRequests
from sharedpool.broker.server.drop_log import DropLog
from sharedpool.broker.server.executor import Executor
from sharedpool.broker.server.processes import Peer, process
from sharedpool.broker.server.router_socket import Incoming, RouterSocket
from sharedpool.discovery.pid_namespace import pid_namespace, pid_namespace_id
from sharedpool.errors import ProtocolError
from sharedpool.wire.admin import Order
from sharedpool.wire.codec import decode_to_broker, hello_version
from sharedpool.wire.messages import PROTOCOL_VERSION, Hello, Reject
from sharedpool.wire.reports import Status

# Messages read in one turn, before timers and process ends are looked at.
_BATCH = 500
# Under load so many messages share one write to the journal; their answers are sent after it.
_AT_ONCE = 16
_ERROR_CHARACTERS = 200  # of the error about an invalid message


class Inbox:
    """The messages that come to the broker's ROUTER socket."""

    def __init__(
        self,
        router: RouterSocket,
        ledger: Ledger,
        executor: Executor,
        admin_requests: AdminRequests,
    ) -> None:
        self._router = router
        self._ledger = ledger
        self._executor = executor
        self._admin_requests = admin_requests
        self._drop_log = DropLog()
        self._host, self._pid_namespace = socket.gethostname(), pid_namespace_id()

    def read(self) -> bool:
        """Handle the next batch of messages; return True if there are more."""
        if self._router.readable:
            for number, incoming in enumerate(self._router.read(_BATCH), 1):
                self._handle(incoming)
                if number % _AT_ONCE == 0:
                    self._executor.deliver()
            self._executor.deliver()
        return self._router.readable

    def _handle(self, incoming: Incoming) -> None:
        session, body, frame = incoming
        try:
            message = decode_to_broker(body)
        except ProtocolError as error:
            self._handle_invalid(session, body, error)
            return
        now = time.monotonic()
        if isinstance(message, Status):
            self._admin_requests.ask(session, message, now)
        elif isinstance(message, Order):
            near = self._router.is_local or self._router.sender(frame).loopback
            self._admin_requests.order(session, message, now, near=near)
        elif isinstance(message, Hello):
            self._register(session, message, self._router.sender(frame), now)
        else:
            self._executor.carry_out(self._ledger.handle(session, message, now))

    def _handle_invalid(self, session: bytes, body: bytes, error: ProtocolError) -> None:
        """Reject a HELLO of another protocol version; drop anything else that cannot be decoded."""
        if (version := hello_version(body)) not in (None, PROTOCOL_VERSION):
            self._executor.send(session, Reject(version_mismatch_text(version), fatal=True))
            return
        name, text = session.hex()[:12], str(error)[:_ERROR_CHARACTERS]
        self._drop_log.dropped("dropped a message from %s: %s", name, text, session=name)

    def _register(self, session: bytes, hello: Hello, peer: Peer, now: float) -> None:
        """Register a worker, under the pid that it has here.

        1. By ipc the kernel tells the peer's pid, as this PID namespace numbers it.
        2. By tcp over loopback, from this host and this PID namespace, the pid that HELLO claims is
           taken. In another namespace (a pod, a container in the host's network) that number is
           another process's, or nobody's.
        3. Otherwise the process cannot be watched; texts name its host or namespace.
        """
        if hello.host == self._host:
            hello = structs.replace(hello, host="")  # texts name only other hosts
        same_namespace = hello.pid_namespace == self._pid_namespace
        near = peer.loopback and not hello.host and same_namespace
        pid = peer.pid or (hello.pid if near else 0)
        if pid:
            # The first process of every container has pid 1 in its own namespace.
            hello = structs.replace(hello, pid=pid)
        elif not hello.host and not same_namespace:
            hello = structs.replace(hello, host=pid_namespace(hello.pid_namespace))
        commands = self._ledger.handle(session, hello, now, process(pid) if pid else None)
        self._executor.carry_out(commands)

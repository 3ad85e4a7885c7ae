"""The state of a pool in one process, which all parts of `LocalPool` share.

`giving.py`, `receiving.py` and `lane_membership.py` build on it, and `local_pool.py` puts them
together. Nothing here opens, closes or moves a connection.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Hashable

from sharedpool.wire.codec import encode
from sharedpool.wire.desk import GIVE_BYTES, Give, Live, Moved, Opened
from sharedpool.wire.messages import CancelQuery, ReleaseReason
from sharedpool.wire.values import Backend, Token
from sharedpool.worker import forks
from sharedpool.worker.connection.closing import dead_socket
from sharedpool.worker.connection.diagnosis import Diagnosis, Failure
from sharedpool.worker.connection.handover import SUPPORTED
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.shells import Shells
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.link.link import Link
from sharedpool.worker.link.registration import Endpoint, Registration
from sharedpool.worker.recoverable_lock import RecoverableLock
from sharedpool.worker.settings import PoolConfig

READ_ONLY = "25006"
# SQLSTATEs of a server that is read-only, is going down, or has just started.
FAILOVER = frozenset({READ_ONLY, "57P01", "57P02", "57P03"})


class LocalState:
    """A pool's cache, its lock, its link to the broker and its counters, in one process.

    The lock is held for bookkeeping only, never across I/O or a user's callback.
    """

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self.pid = os.getpid()
        # Reentrant only so that a finalizer can tell that its own thread holds the lock.
        self.lock = threading.RLock()
        self.cache = Cache(
            config.expiration, pooling=not config.disable_pooling, slice_s=config.time_slice
        )
        self.messages = BrokerMessages(self.cache)  # handles the broker's messages
        self.keys: dict[Hashable, Lease] = {}
        self.dropped: deque[PooledConnection] = deque()  # by their users; to be checked in
        self.reclaim_lock = RecoverableLock()  # held across I/O; `reset` may enter it again
        self.limit = config.max_conn  # until the broker has named its own
        self.tag = f"sharedpool {config.name}"  # application_name, until the broker has sent one

        self.disposed = False  # `release_all` was called
        self.retired = False  # a newer pool has this one's name: nothing is kept idle
        self.before_fork = False  # the process is about to fork
        # No thread and no connection may outlive a use of the pool.
        self.transient = forks.is_before_uwsgis_forks()
        if self.transient:
            self.cache.stop_keeping()
        # Open while a checkout or checkin may take the fast path: see `Pool.get_conn`.
        self.fast_path = forks.ForkSafeFlag()

        # See `PoolStats`.
        self.hits = self.connects = self.handed_on = self.given = self.adopted = 0
        self.discarded = self.errors = 0
        self.released: dict[ReleaseReason, int] = dict.fromkeys(ReleaseReason, 0)

        # Set and cleared together.
        self.link: Link | None = None
        self.registration: Registration | None = None

        # False once the hand-over was found not to work in this process.
        self.handover_enabled = config.handover and not config.disable_pooling and SUPPORTED
        self.hands_over = False  # `handover_enabled`, and the broker takes part
        self.shells = Shells(config.conninfo.python_kwargs)
        self.diagnosis = Diagnosis()
        with contextlib.suppress(OSError):  # else it is made when first needed
            dead_socket()

    # --- the link

    def wake_link(self) -> None:
        """Have the link's thread look for work."""
        link = self.link  # read once: the link's thread may clear it at any moment
        if link is not None:
            link.wake()

    def flush(self) -> None:
        """Have the link send the outbox. An empty outbox does not wake the link's thread."""
        if self.cache.outbox:
            self.wake_link()

    def detach(self, endpoint: Endpoint) -> None:
        """Forget the registration of `endpoint`, unless it was replaced. The lock must be held."""
        if self.registration is not None and self.registration.endpoint is endpoint:
            self.link = self.registration = None

    def deposit(self, lease: Lease, conn: PooledConnection) -> None:
        """Pass a duplicate of a connection's socket to the broker's desk, if it has none."""
        link, registration = self.link, self.registration
        if not lease.deposited and link is not None and registration is not None:
            lease.deposited = link.desk.deposit(registration.identity, lease.token, conn)

    def name_backend(self, lease: Lease, backend: Backend) -> None:
        """Tell the broker's desk which backend a new connection has, in case this process dies."""
        link, registration = self.link, self.registration
        if lease.deposited and link is not None and registration is not None:
            link.desk.send(encode(Opened(registration.identity, lease.token, backend)))

    def send_give(self, lease: Lease, reason: ReleaseReason, live: Live) -> bool:
        """Tell the broker's desk that a session is detached and may be passed on.

        Return False if the message cannot be sent: the session must be ended then.
        """
        link, registration = self.link, self.registration
        if link is None or registration is None:
            return False
        packet = encode(Give(registration.identity, lease.token, reason, live))
        return len(packet) <= GIVE_BYTES and link.desk.send(packet)

    # --- messages for the broker

    def give_back(
        self, lease: Lease, reason: ReleaseReason, *, gone: bool = True, peer_closed: bool = False
    ) -> None:
        """Give back a lease that has no connection here.

        `gone`: no backend is left on the server. `peer_closed`: the other side has closed the
        connection, which proves nothing if a proxy is in between.
        """
        with self.lock:
            self.cache.closed(lease, reason, gone=gone, peer_closed=peer_closed)
        self.wake_link()

    def not_opened(self, lease: Lease, reason: ReleaseReason, failure: Failure) -> None:
        """Give back a lease for which no connection could be opened."""
        with self.lock:
            self.cache.closed(
                lease,
                reason,
                gone=failure.gone,
                peer_closed=failure.peer_closed,
                error=failure.error,
                code=failure.code,
                unreachable=failure.unreachable,
            )
        self.wake_link()

    def refuse(self, moved: Moved) -> None:
        """Have the broker end a connection that has arrived and cannot be used here."""
        with self.lock:
            self.messages.refuse(moved, time.monotonic())
        self.wake_link()

    def cancel_query(self, token: Token, *, trial: bool = False) -> None:
        """Have the broker cancel the query that a lease's connection is executing."""
        with self.lock:
            if (lease := self.cache.leases.get(token)) is not None:
                lease.cancelled = True
            self.cache.outbox.append(CancelQuery(token, trial))
        self.wake_link()

    def report_failover_sign(self, lease: Lease, code: str) -> None:
        """Report a sign of a failover: an SQLSTATE, or "" for a connection that was found dead."""
        with self.lock:
            self.cache.report_failover_sign(lease, code)
        self.wake_link()

    def notice(self, conn: PooledConnection, error: BaseException) -> None:
        """Report the error of a user's statement to the broker if it is a sign of a failover."""
        code, lease = getattr(error, "pgcode", None), conn.sharedpool_lease
        if code in FAILOVER and lease is not None:
            self.report_failover_sign(lease, code)

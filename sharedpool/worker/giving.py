"""Give a live connection to another process, in the lane or by the broker, the slow path.

The steps are in `worker/connection/handover.py`; `mover.py` is the fast path for the usual case.
"""

from __future__ import annotations

import math
import time

from sharedpool.descriptors.owned import Owned, close_if_ours
from sharedpool.lane.lane import MovingConnection
from sharedpool.wire.desk import Live
from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Backend
from sharedpool.worker.connection.closing import end_session, take_witness
from sharedpool.worker.connection.handover import prepare, vacate
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.core.lease import Closing, Lease
from sharedpool.worker.lane_membership import LaneMembership
from sharedpool.worker.local_state import LocalState

# Why others want a connection: with these reasons it may live on in another process.
_ASKED_FOR = (ReleaseReason.TAKEN, ReleaseReason.RETURN_DUE, ReleaseReason.SHARED)


class Giver:
    """Gives the connections that the cache has decided to close and that others want."""

    def __init__(self, local: LocalState, membership: LaneMembership) -> None:
        self._local = local
        self._membership = membership

    def may_give(self, closing: Closing, conn: PooledConnection) -> bool:
        """Return True if another process wants this connection and can be given it."""
        lease = closing.lease
        if closing.reason not in _ASKED_FOR or not self._local.hands_over:
            return False
        if not (conn.sharedpool_movable and lease.deposited and lease.backend is not None):
            return False
        if closing.reason is not ReleaseReason.SHARED:
            return True
        wait_sockets = self._membership.wait_sockets
        if wait_sockets is None or not wait_sockets.lane.open or lease.cancelled:
            return False
        board = wait_sockets.lane.board
        lease.cell = board.find(lease.token, lease.cell)
        return lease.cell >= 0 and lease.generation == board.generation

    def give(self, closing: Closing, conn: PooledConnection) -> bool:
        """Give a connection to another process; return False if it must be closed instead."""
        lease = closing.lease
        assert lease.backend is not None
        with self._local.lock:
            self._local.cache.giving(lease)
        try:
            parameters = prepare(conn, self._local.config.reset_command)
            if parameters is not None:
                self._give_away(closing, conn, lease.backend, parameters)
        except BaseException:
            lease.conn = conn  # interrupted: the link finishes it
            raise
        if parameters is None:
            lease.conn = conn
        return parameters is not None

    def _give_away(
        self, closing: Closing, conn: PooledConnection, backend: Backend, parameters: bytes
    ) -> None:
        """Detach the session from its connection object, and pass it on; else end the session."""
        local, lease = self._local, closing.lease
        now = time.monotonic()
        left_ms = None
        if lease.retire_at != math.inf:
            left_ms = max(0, int((lease.retire_at - now) * 1000))
        live = Live(backend, lease.generation, parameters, left_ms, conn.sharedpool_names or b"")
        # Taken first: after an interrupt the link closes `conn`, and with the witness still there
        # would end the session that another process may have by then.
        witness = take_witness(conn)
        # Once vacated, the session's only sockets are the witness and the broker's duplicate.
        passed_on = vacate(conn) and (
            self._put_in_lane(closing, live, witness)
            or local.send_give(lease, closing.reason, live)
        )
        if passed_on:
            with local.lock:
                local.cache.given(lease)
                local.cache.time_slice.note_given(time.monotonic())
                local.released[closing.reason] += 1
                local.given += 1
            local.shells.keep(conn, parameters)
            if local.retired or local.disposed:
                local.wake_link()  # this may have been the last lease
        else:
            end_session(conn, witness)
            local.give_back(lease, closing.reason, gone=conn.sharedpool_gone)
        if witness is not None:
            close_if_ours(witness, conn.sharedpool_known)

    def _put_in_lane(self, closing: Closing, live: Live, witness: Owned | None) -> bool:
        """Pass a session on in the lane, if others wait there; return True if that was done."""
        wait_sockets, lease = self._membership.wait_sockets, closing.lease
        if closing.reason is not ReleaseReason.SHARED or wait_sockets is None or witness is None:
            return False
        if wait_sockets.not_quiet:
            wait_sockets.receive_strays()
        return wait_sockets.lane.give(
            MovingConnection(lease.token, lease.cell, live, witness.fileno())
        )

    def give_to_broker(
        self, lease: Lease, conn: PooledConnection, live: Live, witness: Owned, *, fit: bool
    ) -> None:
        """Pass a session that is reset and detached to the broker; end it if it is not `fit`.

        For a session that was to move in the lane and could not (`mover.py`).
        """
        local = self._local
        if fit and local.send_give(lease, ReleaseReason.SHARED, live):
            with local.lock:
                local.cache.given(lease)
                local.given += 1
            local.shells.keep(conn, live.parameters)
        else:
            end_session(conn, witness)
            local.give_back(lease, ReleaseReason.SHARED, gone=conn.sharedpool_gone)
        close_if_ours(witness, conn.sharedpool_known)

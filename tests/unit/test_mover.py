"""The fast path in the lane, with real connection objects, and a server of which a test says what
it says."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import weakref
from typing import Any

import pytest
from psycopg2 import extensions

from sharedpool.descriptors.readable import readable
from sharedpool.descriptors.timer import Timer
from sharedpool.lane import lane as lanes
from sharedpool.wire.board import PLACES
from sharedpool.wire.messages import Release, ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.handover import SUPPORTED
from sharedpool.worker.core.lease import Lease, Waiter
from sharedpool.worker.mover import Mover
from tests.support.waiting import wait_until
from tests.unit.mover_driver import DONE, LIVE, READY, Rig, rig

__all__ = ["rig"]  # pytest finds it here

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and lanes.SUPPORTED), reason="connections cannot be handed over on this platform"
)

_ERROR = b"E" + struct.pack("!i", 20) + b"SERROR\0C57014\0\0\0"
_RESET = b"Q" + struct.pack("!i", 16) + b"DISCARD ALL\0"


def test_a_connection_on_the_shelf_after_the_ticket_was_written_is_found(rig: Rig) -> None:
    """Nobody would bring it: who laid it there has looked for tickets before this one's."""
    token = rig.give()
    conn = rig.take()
    assert conn is not None
    assert rig.lease(conn).token == token
    assert rig.lane.board.holding(1).holder == 1
    assert (rig.lease(conn).phase, rig.lease(conn).cell, rig.lease(conn).moves) == (
        Phase.IN_USE,
        1,
        2,
    )
    assert conn.status == extensions.STATUS_READY


def test_a_connection_that_arrives_during_the_wait_is_taken(rig: Rig) -> None:
    def give() -> None:
        while not rig.lane.board.waiting([0]):
            time.sleep(0.001)
        rig.give(on_shelf=False)

    giver = threading.Thread(target=give)
    giver.start()
    conn = rig.take(10.0)
    giver.join()
    assert conn is not None
    assert rig.lane.board.waiting([0]) == 0


def test_a_thread_that_gets_nothing_waits_its_timeout_and_leaves_no_turn(rig: Rig) -> None:
    began = time.monotonic()
    assert rig.take(0.1) is None
    assert time.monotonic() - began >= 0.1
    assert rig.lane.board.waiting([0]) == 0
    assert rig.other.next_ticket() is None


def test_a_waiting_thread_leaves_when_connections_move_no_more(rig: Rig) -> None:
    rig.lane.board.moving = False
    began = time.monotonic()
    assert rig.take(30.0) is None
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize(
    "said",
    [
        _ERROR + READY,
        DONE + b"Z" + struct.pack("!i", 5) + b"T",
        b"S" + struct.pack("!i", 22) + b"TimeZone\0Asia/Oslo\0" + DONE + READY,
        DONE,
        b"",
    ],
    ids=["an error", "a transaction", "another parameter", "half of it", "nothing"],
)
def test_a_connection_is_used_when_its_reset_is_done_and_not_otherwise(
    rig: Rig, said: bytes
) -> None:
    token = rig.give(said)
    assert rig.take() is None
    assert rig.is_over(token)
    (release,) = [x for x in rig.local.cache.outbox if isinstance(x, Release)]
    assert (release.token, release.reason, release.gone) == (token, ReleaseReason.FAILED, False)
    assert not rig.local.cache.leases
    assert not rig.local.cache.arriving


def test_a_checkin_sends_the_reset_and_gives(rig: Rig) -> None:
    token = rig.give()
    conn = rig.take()
    assert conn is not None
    assert rig.check_in(conn)
    assert rig.servers[1].recv(100) == _RESET
    taken = rig.other.take_from_shelf()
    assert taken is not None
    moved, sock = taken
    assert (moved.token, moved.live) == (token, LIVE)
    sock.close()
    assert rig.is_over(token)  # this process has none of it any more
    assert not rig.local.cache.leases
    assert rig.local.given == 1


def test_a_checkin_gives_to_who_has_waited_longest(rig: Rig) -> None:
    rig.give()
    conn = rig.take()
    assert conn is not None
    wait_socket = rig.other.wait_socket(5 * PLACES)
    rig.other.board.take_place(5 * PLACES, 44)
    rig.other.add_ticket(lanes.Ticket(2, 5 * PLACES, 44))
    assert rig.check_in(conn)
    got = rig.other.receive(wait_socket)
    wait_socket.close()
    assert got is not None
    moved, sock = got
    sock.close()
    assert (moved.request, moved.moves) == (44, 3)


@pytest.mark.parametrize("retired", [False, True])
def test_a_retired_pool_keeps_no_connection_for_a_time_slice(rig: Rig, retired: bool) -> None:
    rig.give()
    conn = rig.take()
    assert conn is not None
    local, lease = rig.local, rig.lease(conn)
    local.cache.enter_lane(rig.lane.board.moving_flag)
    local.membership.mover = Mover(local, rig.wait_sockets, rig.lane, Timer())
    if retired:
        local.retire()
    take_lease(conn)
    lease.idle_s, now = 0.0, lease.arrived_at + 0.001  # steady use
    lease.conn, lease.phase = conn, Phase.IDLE
    local.cache.idle.append(lease)
    local.after_fast_checkin(lease, now, lease.since)
    assert list(local.cache.idle) == ([] if retired else [lease])


def test_a_connection_with_half_a_message_in_its_buffer_is_not_given(rig: Rig) -> None:
    """The rest would be missing to who reads on: the session ends, and the slot is free."""
    token = rig.give()
    conn = rig.take()
    assert conn is not None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"A" + struct.pack("!ii", 100, 1) + b"news")
        session = os.dup(conn.fileno())
        os.dup2(ours.fileno(), conn.fileno())
        assert conn.poll() == extensions.POLL_OK
        os.dup2(session, conn.fileno())
        os.close(session)
    assert rig.check_in(conn)
    assert rig.other.take_from_shelf() is None
    assert rig.is_over(token)
    assert not rig.local.cache.leases
    assert [x.token for x in rig.local.cache.outbox if isinstance(x, Release)] == [token]


@pytest.mark.parametrize(
    "case", ["older generation", "struck", "cancelled", "aged", "a thread waits here"]
)
def test_an_unusual_connection_takes_the_slow_path_untouched(rig: Rig, case: str) -> None:
    token = rig.give()
    conn = rig.take()
    assert conn is not None
    lease = rig.lease(conn)
    if case == "older generation":
        rig.lane.board.generation = 2
    elif case == "struck":
        rig.lane.board.remove(1)
    elif case == "cancelled":
        lease.cancelled = True
    elif case == "aged":
        lease.retire_at = time.monotonic()
    else:
        waiter = Waiter(lambda: None, time.monotonic())
        rig.local.cache.waiters.enqueue(waiter, 5.0)
    assert not rig.check_in(conn)
    assert not readable([rig.servers[1]], 0)  # nothing was sent
    assert (lease.phase, rig.local.cache.leases) == (Phase.IN_USE, {token: lease})


@pytest.mark.parametrize("on_shelf", [True, False])
def test_a_received_connection_is_listed_or_the_report_is_marked_unsure(
    rig: Rig, on_shelf: bool
) -> None:
    thread = threading.current_thread()
    wait_socket = rig.wait_sockets.take(weakref.ref(thread))
    assert wait_socket is not None
    assert wait_socket.wait(0) is None
    assert not rig.wait_sockets.busy
    if not on_shelf:
        wait_socket.join_queue(1)
    rig.give(on_shelf=on_shelf)
    got = wait_socket.take_from_shelf() if on_shelf else wait_socket.wait(5)
    assert got is not None
    assert rig.wait_sockets.busy
    got[1].close()
    rig.wait_sockets.give_back(wait_socket)
    assert not rig.wait_sockets.busy
    rig.give(on_shelf=True)
    assert rig.take() is not None
    assert not rig.wait_sockets.busy


def test_a_connection_sent_to_a_wait_socket_in_a_former_brokers_lane_is_kept(rig: Rig) -> None:
    wait_socket = rig.wait_sockets.take(None)
    assert wait_socket is not None
    wait_socket.join_queue(1)
    token = rig.give(on_shelf=False)
    rig.local.membership.wait_sockets = rig.wait_sockets
    rig.local.messages.welcomed(2, 7, time.monotonic())
    rig.local.membership.leave(to_new_broker=True)
    lease = rig.local.cache.leases[token]
    assert (lease.phase, lease.generation) == (Phase.IDLE, 7)
    conn: Any = lease.conn
    conn.close()


def test_a_waiting_thread_leaves_a_former_brokers_lane_in_which_connections_move_for_ever(
    rig: Rig,
) -> None:
    took: list[object] = []
    thread = threading.Thread(target=lambda: took.append(rig.mover.take(30.0, time.monotonic())))
    thread.start()
    wait_until(lambda: rig.lane.board.waiting([0]) == 1)
    rig.local.membership.wait_sockets = rig.wait_sockets
    rig.local.membership.leave(to_new_broker=True)
    thread.join(5)
    assert took == [None]


def test_a_connection_that_comes_back_while_it_is_given_stays(rig: Rig) -> None:
    """Another thread of this process has received it before its giver is done."""
    token = rig.give()
    conn = rig.mover.take(5.0, time.monotonic())
    assert conn is not None
    former, lease = Lease(token, None, 0.0), rig.local.cache.leases[token]
    rig.local.cache.given(former)
    assert rig.local.cache.leases[token] is lease
    rig.local.cache.given(lease)
    assert token not in rig.local.cache.leases
    conn.close()

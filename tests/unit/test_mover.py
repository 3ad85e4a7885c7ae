"""The fast path in the lane, with real connection objects, and a server of which a test says what
it says."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest
from psycopg2 import extensions

from sharedpool.broker_location import GivenBroker
from sharedpool.descriptors.readable import readable
from sharedpool.descriptors.timer import Timer
from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import Lane, MovingConnection
from sharedpool.lane.wait_sockets import WaitSockets
from sharedpool.postgres.conninfo import resolve
from sharedpool.wire.board import PLACES, SHELF
from sharedpool.wire.desk import Live
from sharedpool.wire.messages import Release, ReleaseReason
from sharedpool.wire.values import Backend, Phase, Token
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.handover import SUPPORTED, encoded_parameters, names_of_parameters
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.server_facts import ServerFacts
from sharedpool.worker.core.lease import Lease, Waiter
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.mover import Mover
from sharedpool.worker.session import Session
from sharedpool.worker.settings import PoolConfig
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and lanes.SUPPORTED), reason="connections cannot be handed over on this platform"
)

_SAID = {
    b"server_version": b"16.2",
    b"server_encoding": b"UTF8",
    b"client_encoding": b"UTF8",
    b"DateStyle": b"ISO, MDY",
    b"TimeZone": b"UTC",
    b"integer_datetimes": b"on",
    b"standard_conforming_strings": b"on",
}
_NAMES = msgspec.msgpack.encode(ServerFacts("u", "d", "", 5432, "", False, "dbname=d", {}))
LIVE = Live(
    Backend(7, 1, 1, direct=True),
    1,
    encoded_parameters(tuple(map(_SAID.get, names_of_parameters))),
    None,
    _NAMES,
)
_DONE = b"C" + struct.pack("!i", 16) + b"DISCARD ALL\0"
_READY = b"Z" + struct.pack("!i", 5) + b"I"
_ERROR = b"E" + struct.pack("!i", 20) + b"SERROR\0C57014\0\0\0"
_RESET = b"Q" + struct.pack("!i", 16) + b"DISCARD ALL\0"


class Rig:
    """A process in a lane, another one's end of it, and the server's ends of the connections that
    move."""

    def __init__(self) -> None:
        config = PoolConfig(resolve(dsn="host=nowhere user=u dbname=d"), timeout=5.0)
        self.local = LocalPool(config, GivenBroker("ipc:///nowhere"), Session, Mover)
        self.local.messages.welcomed(1, 1, time.monotonic())
        self.local.receiver.works = True  # it was seen to work here
        self.fds = lanes.make()
        self.lane = Lane([os.dup(fd) for fd in self.fds], 1)
        self.other = Lane([os.dup(fd) for fd in self.fds], 2)
        self.wait_sockets = WaitSockets(self.lane, 0, lambda moved, sock: sock.close())
        self.mover = Mover(self.local, self.wait_sockets, self.lane, None)
        self.lane.board.generation, self.lane.board.moving = 1, True
        self.servers: dict[int, socket.socket] = {}

    def give(self, said: bytes = _DONE + _READY, *, on_shelf: bool = True) -> Token:
        """Have the other process give a connection, whose server has said this to its reset."""
        serial = len(self.servers) + 1
        token = Token(1, serial)
        ours, self.servers[serial] = socket.socketpair()
        self.servers[serial].sendall(said)
        self.lane.board.enter(serial, token, 2, 0)
        with ours:
            assert self.other.give(MovingConnection(token, serial, LIVE, ours.fileno()))
        assert not on_shelf or self.lane.board.holding(serial).holder == SHELF
        return token

    def take(self, wait_s: float = 0.3) -> PooledConnection | None:
        return self.mover.take(wait_s, time.monotonic())

    def lease(self, conn: PooledConnection) -> Lease:
        lease = conn.sharedpool_lease
        assert isinstance(lease, Lease)
        return lease

    def check_in(self, conn: PooledConnection) -> bool:
        lease = self.lease(conn)
        take_lease(conn)
        return self.mover.give(lease, conn, time.monotonic())

    def is_over(self, token: Token) -> bool:
        """Return True if the connection's session has ended and nothing can be written to it."""
        server = self.servers[token.serial]
        with contextlib.suppress(ConnectionResetError):
            while readable([server], 0):
                if not server.recv(1000):
                    return True
        return False

    def close(self) -> None:
        self.wait_sockets.disown()
        for lane in (self.lane, self.other):
            lane.close()
        for fd in self.fds:
            os.close(fd)
        for server in self.servers.values():
            server.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


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
        _ERROR + _READY,
        _DONE + b"Z" + struct.pack("!i", 5) + b"T",
        b"S" + struct.pack("!i", 22) + b"TimeZone\0Asia/Oslo\0" + _DONE + _READY,
        _DONE,
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


# --- slices of time


class Slicing(Rig):
    """A process that keeps a connection for its slice of time, as it asks again at once."""

    def __init__(self) -> None:
        super().__init__()
        self.timer = Timer()
        self.mover = Mover(self.local, self.wait_sockets, self.lane, self.timer)
        (
            self.local.membership.wait_sockets,
            self.local.membership.mover,
            self.local.hands_over,
        ) = (
            self.wait_sockets,
            self.mover,
            True,
        )
        self.local.cache.enter_lane(self.lane.board.moving_flag)

    def steady(self) -> PooledConnection:
        """Return a connection that was asked for as soon as the last one was gone, and has just
        come."""
        conn = self.take()
        assert conn is not None
        lease = self.lease(conn)
        lease.idle_s, lease.arrived_at = (
            0.0,
            time.monotonic() + 60.0,
        )  # however long the test is held up
        return conn

    def close(self) -> None:
        self.timer.close()
        super().close()


@pytest.fixture
def slicing() -> Iterator[Slicing]:
    rig = Slicing()
    yield rig
    rig.close()


def test_in_its_slice_it_is_kept_and_given_when_nobody_comes(slicing: Slicing) -> None:
    slicing.give()
    conn = slicing.steady()
    assert slicing.check_in(conn)
    assert len(slicing.local.cache.idle) == 1
    assert readable([slicing.timer], 5.0)
    slicing.timer.clear()
    slicing.local.give_kept()
    assert not slicing.local.cache.idle
    taken = slicing.other.take_from_shelf()
    assert taken is not None
    taken[1].close()


def test_a_thread_that_kept_one_in_vain_keeps_none_until_it_asks_at_once(slicing: Slicing) -> None:
    """Two processes that take turns: each asks again soon after it has given, and
    the other waits."""

    def keeps(idle_s: float) -> bool:
        slicing.give()
        conn = slicing.steady()
        slicing.lease(conn).idle_s = idle_s
        assert slicing.check_in(conn)
        kept = bool(slicing.local.cache.idle)
        if not kept:
            taken = slicing.other.take_from_shelf()
            assert taken is not None
            taken[1].close()
        return kept

    assert keeps(0.0005)
    (lease,) = slicing.local.cache.idle
    lease.since -= 60.0
    slicing.local.give_kept()
    taken = slicing.other.take_from_shelf()
    assert taken is not None
    taken[1].close()
    assert not keeps(0.0005)
    assert keeps(0.0)
    (lease,) = slicing.local.cache.idle
    lease.since = lease.arrived_at + 1.0  # it is asked for again
    conn = cast(PooledConnection, slicing.local.cache.idle.pop().conn)
    conn.sharedpool_lent = lease
    assert slicing.check_in(conn)
    assert keeps(0.0005)


def test_after_its_slice_it_is_given(slicing: Slicing) -> None:
    slicing.give()
    conn = slicing.steady()
    slicing.lease(conn).arrived_at -= 61.0
    assert slicing.check_in(conn)
    assert not slicing.local.cache.idle
    assert not slicing.timer.armed


def test_while_one_is_kept_the_others_checkin_leaves_the_timer_set(slicing: Slicing) -> None:
    slicing.give()
    slicing.give(on_shelf=False)
    kept, given = slicing.steady(), slicing.steady()
    slicing.lease(given).arrived_at -= 61.0
    assert slicing.check_in(kept)
    assert slicing.check_in(given)
    assert len(slicing.local.cache.idle) == 1
    assert slicing.timer.armed


def test_a_connection_put_there_a_moment_ago_is_looked_at_again(slicing: Slicing) -> None:
    """The timer was set for another one, before."""
    slicing.give()
    conn = slicing.steady()
    assert slicing.check_in(conn)
    slicing.timer.clear()
    (lease,) = slicing.local.cache.idle
    lease.since = time.monotonic() + 1.0  # however long the test is held up
    slicing.local.give_kept()
    assert list(slicing.local.cache.idle) == [lease]
    assert slicing.timer.armed


def test_a_timer_that_fires_meanwhile_is_set_again(slicing: Slicing) -> None:
    slicing.give()
    conn = slicing.steady()

    class Idle(deque[Lease]):
        def append(self, lease: Lease) -> None:
            slicing.timer.clear()  # the link's thread, at this moment
            slicing.local.give_kept()
            super().append(lease)

    slicing.local.cache.idle = Idle()
    assert slicing.check_in(conn)
    assert slicing.timer.armed


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

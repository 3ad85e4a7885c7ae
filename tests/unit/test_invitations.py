"""Invitations to a lane that come before the WELCOME, which comes another way: with a line to a
real desk's socket."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedpool.broker_location import GivenBroker
from sharedpool.lane import lane as lanes
from sharedpool.lane.wait_sockets import WaitSocket, WaitSockets
from sharedpool.postgres.conninfo import resolve
from sharedpool.wire.codec import decode_to_desk
from sharedpool.wire.desk import PACKET_BYTES, Joined, LaneInvitation, LineOwner
from sharedpool.wire.messages import PROTOCOL_VERSION, Acquire, Hello, Recall, Renew, Welcome
from sharedpool.worker.connection.handover import SUPPORTED
from sharedpool.worker.core.lease import Waiter
from sharedpool.worker.link.link import Link
from sharedpool.worker.link.links import SharedContext
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.mover import Mover
from sharedpool.worker.session import Session
from sharedpool.worker.settings import PoolConfig

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and lanes.SUPPORTED), reason="connections cannot be handed over on this platform"
)


class Rig:
    """A pool's session in a process with a line to a desk: another of its pools is registered with
    broker 7."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._desk: socket.socket | None = None  # the broker's end of the line
        self._path = str(path)
        self.local = LocalPool(
            PoolConfig(resolve(dsn="host=nowhere user=u dbname=d")),
            GivenBroker("ipc:///nowhere"),
            Session,
            Mover,
        )
        self._session = Session(self.local)
        self._link = Link("ipc:///nowhere", SharedContext())
        registration = self._link.attach(self._session, self.local.cache.outbox, None)
        assert registration is not None
        self._registration = self.local.registration = registration
        self.local.link = self._link
        self._taken: list[tuple[WaitSockets, WaitSocket]] = []
        self._connect(7)
        self.recalls = 0

    def _connect(self, epoch: int) -> None:
        if self._desk is not None:
            self._desk.close()
        self._link.desk.open(self._path, self._link.identity)
        self._link.epoch = epoch
        self._desk, _ = self._listener.accept()
        assert isinstance(decode_to_desk(self._desk.recv(PACKET_BYTES)), LineOwner)

    def invite(self) -> list[int]:
        """Have an invitation come from the broker whose line this is; return its descriptors."""
        fds = lanes.make()
        self._session.invited(
            LaneInvitation(self._registration.identity, 1, 0, lanes.network_namespace_id()), fds
        )
        return fds

    def welcome(self, epoch: int) -> None:
        """Have a broker's WELCOME come: as the link does, on a line to this broker's desk."""
        if epoch != self._link.epoch:
            self._connect(epoch)
        self._registration.established = True
        said = Welcome(PROTOCOL_VERSION, epoch, 2, 60_000, 9_000, desk=self._path, handover=True)
        self._session.receive(said)

    def hello(self) -> Hello:
        return self._session.compose_hello()

    def ask(self) -> Waiter:
        """Have a thread ask the broker, that waits in the lane."""
        wait_sockets, waiter = self.local.membership.wait_sockets, Waiter(lambda: None, 0.0)
        assert wait_sockets is not None
        wait_socket = wait_sockets.take(None)
        assert wait_socket is not None
        self._taken.append((wait_sockets, wait_socket))
        self.local.cache.waiters.enqueue(waiter, 1000.0, place=wait_socket.place)
        return waiter

    def answer(self) -> Renew:
        """Have the broker ask for what is held; return what it is told."""
        self.recalls += 1
        self._session.receive(Recall(self.recalls, 0, 0))
        (told,) = [
            each
            for each in self.local.cache.outbox
            if isinstance(each, Renew) and each.answers == self.recalls
        ]
        return told

    def asked(self) -> list[tuple[int, int]]:
        """The requests in the outbox, and the places that they name."""
        return [
            (each.request, each.lane_place)
            for each in self.local.cache.outbox
            if isinstance(each, Acquire)
        ]

    def has_joined(self) -> bool:
        assert self._desk is not None
        self._desk.setblocking(False)
        try:
            return isinstance(decode_to_desk(self._desk.recv(PACKET_BYTES)), Joined)
        except BlockingIOError:
            return False

    def close(self) -> None:
        self.local.membership.keep_invitation(None, [])
        self.local.membership.leave()
        for wait_sockets, wait_socket in self._taken:
            wait_sockets.give_back(wait_socket)
        self._link.desk.close()
        if self._desk is not None:
            self._desk.close()
        self._listener.close()
        self._link._close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "desk")
    yield rig
    rig.close()


def test_an_early_invitation_is_kept_until_the_welcome(rig: Rig) -> None:
    rig.invite()
    assert rig.local.membership.wait_sockets is None
    rig.welcome(7)
    assert rig.local.membership.wait_sockets is not None
    assert rig.has_joined()


def test_an_invitation_of_a_broker_that_died_before_its_welcome_came_is_not_followed(
    rig: Rig,
) -> None:
    """Its lane would have no other members: a thread would wait there for its whole timeout."""
    fds = rig.invite()
    memory = os.fstat(fds[0]).st_ino
    rig.welcome(8)
    assert rig.local.membership.wait_sockets is None
    assert not rig.has_joined()
    assert memory not in [
        os.stat(each).st_ino for each in Path("/proc/self/fd").iterdir() if each.exists()
    ]


def test_the_next_brokers_invitation_is_followed_after_it(rig: Rig) -> None:
    rig.invite()
    rig.welcome(8)
    rig.invite()
    assert rig.local.membership.wait_sockets is not None
    assert rig.has_joined()


def test_no_request_tells_the_next_broker_its_place_in_the_former_lane(rig: Rig) -> None:
    """At that number there may be somebody else's thread in the next lane, or nobody."""
    rig.invite()
    rig.welcome(7)
    waiters = [rig.ask() for _ in range(2)]
    assert rig.asked() == [(each.request, each.lane_place) for each in waiters]
    assert min(each.lane_place for each in waiters) >= 0
    first = rig.hello().first
    assert first is not None
    assert (first.request, first.lane_place) == (waiters[0].request, -1)
    rig.welcome(8)
    assert rig.asked() == [(each.request, -1) for each in waiters]


class Call:
    """A thread's call, as long as it lasts."""


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_next_broker_is_told_what_a_thread_may_have_from_the_former_ones_lane(
    rig: Rig, interrupted: bool
) -> None:
    """It has read it before the lane was left, and is held up: only when it goes on it will be
    listed."""
    rig.invite()
    rig.welcome(7)
    call, wait_sockets = Call(), rig.local.membership.wait_sockets
    assert wait_sockets is not None
    wait_socket = wait_sockets.take(weakref.ref(call))
    assert wait_socket is not None
    assert not rig.answer().unsure
    wait_socket.busy = True
    rig.welcome(8)
    assert [rig.answer().unsure for _ in range(2)] == [True, True]
    if interrupted:
        del call  # it has nothing any more
    else:
        wait_socket.busy = False
    assert not rig.answer().unsure
    wait_sockets.give_back(wait_socket)

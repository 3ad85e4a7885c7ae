"""Packets in the lane that are not as they should be."""

from __future__ import annotations

import socket

import pytest
from msgspec import structs

from sharedpool.descriptors import passing
from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import MovingConnection
from sharedpool.wire.board import CELLS
from sharedpool.wire.codec import encode
from sharedpool.wire.desk import Live, Moved
from tests.unit.lane_driver import GENERATION, LIVE, Rig, open_descriptors, rig

__all__ = ["rig"]  # pytest finds it here

pytestmark = pytest.mark.skipif(not lanes.SUPPORTED, reason="no lane on this platform")


def packet(
    rig: Rig, item: MovingConnection, *, live: Live = LIVE, cell: int | None = None
) -> bytes:
    return rig.board.secret + encode(
        Moved(5, item.token, item.cell if cell is None else cell, 1, live)
    )


# Nobody waits any longer for a connection of which such a packet tells.
TOLD = ["generation", "struck", "another's cell", "no cell", "two sockets", "no socket"]


@pytest.mark.parametrize("case", [*TOLD, "secret", "nonsense", "empty"])
@pytest.mark.parametrize("where", ["wait_socket", "shelf"])
def test_a_packet_that_is_not_as_it_should_be_is_dropped_and_its_socket_closed(
    rig: Rig, case: str, where: str
) -> None:
    """That no descriptor was free for its socket looks as if none had come."""
    rig.b.wait(0, 5)
    item, other = rig.connection(), rig.connection()
    said = packet(rig, item)
    fds = [item.fd]
    if case == "secret":
        said = bytes(16) + said[16:]
    elif case == "generation":
        said = packet(rig, item, live=structs.replace(LIVE, generation=GENERATION - 1))
    elif case == "struck":
        rig.board.remove(item.cell)
    elif case == "another's cell":
        said = packet(rig, item, cell=other.cell)
    elif case == "no cell":
        said = packet(rig, item, cell=CELLS + 7)
    elif case == "nonsense":
        said = rig.board.secret + b"\xc1"
    elif case == "two sockets":
        fds.append(other.fd)
    elif case == "no socket":
        fds.clear()
    elif case == "empty":
        said = b""
    if where == "wait_socket":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(rig.b.wait_sockets[0].getsockname())
            passing.send_with_all(sender, said, fds)
    elif said:  # an empty packet cannot be told from the end there
        passing.send_with_all(rig.a.lane._shelf_in, said, fds)  # type: ignore[arg-type]
    before = open_descriptors()
    assert rig.b.came(0) is None if where == "wait_socket" else rig.b.taken() is None
    assert open_descriptors() == before
    assert [moved.token for moved in rig.b.refused] == ([item.token] if case in TOLD else [])
    rig.drop(item)
    assert rig.is_over(item)


def test_a_packet_that_is_as_it_should_be_is_received(rig: Rig) -> None:
    """The counterpart of the above."""
    rig.b.wait(0, 5)
    item = rig.connection()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(rig.b.wait_sockets[0].getsockname())
        passing.send_with_all(sender, packet(rig, item), [item.fd])
    assert rig.b.came(0) == Moved(5, item.token, item.cell, 1, LIVE)


def test_a_packet_that_is_only_looked_at_is_read_by_the_same_rules(rig: Rig) -> None:
    item = rig.connection()
    assert rig.b.lane.moved_in(packet(rig, item)) == Moved(5, item.token, item.cell, 1, LIVE)
    assert rig.b.lane.moved_in(bytes(16) + packet(rig, item)[16:]) is None
    assert rig.b.lane.moved_in(rig.board.secret + b"\xc1") is None

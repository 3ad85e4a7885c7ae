"""Whose end of a connection it is that a socket shows."""

import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator

import pytest

from sharedpool.postgres.peer_closed import other_side_closed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere POLLRDHUP is not used")

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["ipv4", "ipv6"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The client's end of a TCP connection, and the server's."""
    family, host = (
        (socket.AF_INET, "127.0.0.1") if request.param == "ipv4" else (socket.AF_INET6, "::1")
    )
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {request.param} here")
    with listener, socket.create_connection(listener.getsockname()[:2]) as ours:
        theirs, _ = listener.accept()
        with theirs:
            yield ours, theirs


def wait_for(sock: socket.socket, event: int) -> None:
    poller = select.poll()
    poller.register(sock, event)
    assert poller.poll(10_000)


def reset(ours: socket.socket, theirs: socket.socket) -> None:
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    wait_for(ours, select.POLLRDHUP)


def closed(ours: socket.socket, theirs: socket.socket) -> None:
    theirs.close()


def closed_after_us(ours: socket.socket, theirs: socket.socket) -> None:
    ours.shutdown(socket.SHUT_WR)
    assert theirs.recv(1) == b""
    theirs.close()


def closed_with_last_words(ours: socket.socket, theirs: socket.socket) -> None:
    theirs.sendall(b"FATAL")
    theirs.close()


def closed_before_us(ours: socket.socket, theirs: socket.socket) -> None:
    theirs.close()
    wait_for(ours, select.POLLRDHUP)
    ours.shutdown(socket.SHUT_WR)


def closed_and_then_written_to(ours: socket.socket, theirs: socket.socket) -> None:
    """As by libpq's goodbye to a backend that was terminated: it is answered with a RST."""
    theirs.sendall(b"FATAL")
    theirs.close()
    wait_for(ours, select.POLLRDHUP)
    ours.sendall(b"X")
    wait_for(ours, select.POLLERR)


def reset_and_read_elsewhere(ours: socket.socket, theirs: socket.socket) -> None:
    """Another duplicate's reader has been given the error, which is told only once."""
    theirs.sendall(b"data")
    wait_for(ours, select.POLLIN)
    reset(ours, theirs)
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def reset_after_our_shutdown(ours: socket.socket, theirs: socket.socket) -> None:
    ours.shutdown(socket.SHUT_WR)
    assert theirs.recv(1) == b""
    reset(ours, theirs)


def shut_down_by_us(ours: socket.socket, theirs: socket.socket) -> None:
    ours.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "end",
    [closed, closed_after_us, closed_with_last_words, closed_before_us, closed_and_then_written_to],
)
def test_a_fin_proves_that_the_other_side_has_closed(
    pair: Pair, end: Callable[[socket.socket, socket.socket], None]
) -> None:
    end(*pair)
    wait_for(pair[0], select.POLLRDHUP)
    assert other_side_closed(pair[0].fileno())
    assert other_side_closed(pair[0].fileno()), "looking has changed something"


@pytest.mark.parametrize(
    "end", [reset, reset_and_read_elsewhere, reset_after_our_shutdown, shut_down_by_us]
)
def test_the_end_of_a_connection_on_this_side_proves_nothing(
    pair: Pair, end: Callable[[socket.socket, socket.socket], None]
) -> None:
    end(*pair)
    wait_for(pair[0], select.POLLRDHUP)
    assert not other_side_closed(pair[0].fileno())
    assert not other_side_closed(pair[0].fileno())


def test_on_one_host_the_end_is_the_other_sides() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert other_side_closed(ours.fileno())

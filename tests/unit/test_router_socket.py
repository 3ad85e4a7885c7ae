"""The broker's ROUTER socket: what is read there, and from whom it is."""

from pathlib import Path

import zmq

from sharedpool.broker.server.router_socket import Incoming, RouterSocket
from sharedpool.wire.channel import PROCESS_PREFIX, add_channel, channel_number
from sharedpool.wire.codec import encode
from sharedpool.wire.messages import PROTOCOL_VERSION, Renew, Withdraw
from sharedpool.wire.reports import Status
from sharedpool.wire.values import NO_TOKEN
from tests.support.waiting import wait_until

PROCESS = PROCESS_PREFIX + b"-a-worker-------"[:15]
CHANNEL = channel_number(1)
STATUS = Status(PROTOCOL_VERSION)


def dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: str, identity: bytes = b""
) -> zmq.Socket[bytes]:
    sock = context.socket(zmq.DEALER)
    if identity:
        sock.setsockopt(zmq.IDENTITY, identity)
    sock.setsockopt(zmq.LINGER, 2000)
    sock.connect(address)
    return sock


def read_until(router: RouterSocket, body: bytes) -> list[Incoming]:
    """All that comes up to a message with this body."""
    messages: list[Incoming] = []

    def came() -> bool:
        messages.extend(router.read(10))
        return any(message.body == body for message in messages)

    wait_until(came)
    return messages


def test_a_workers_message_over_its_former_connection_is_not_taken_for_a_strangers(
    tmp_path: Path,
) -> None:
    """A broker that was stopped finds two connections of a worker that took it for dead: ZeroMQ
    gives the old one a name of its own, under which the worker's words are nobody's."""
    router, context = RouterSocket(f"ipc://{tmp_path}/router.sock", None), zmq.Context()
    router.bind()
    try:
        former = dealer(context, f"ipc://{tmp_path}/router.sock", PROCESS)
        former.send(add_channel(CHANNEL, encode(Withdraw(1))))
        read_until(router, encode(Withdraw(1)))
        for request in range(2, 6):
            former.send(add_channel(CHANNEL, encode(Withdraw(request))))
        former.close()  # when all is sent
        again = dealer(context, f"ipc://{tmp_path}/router.sock", PROCESS)
        renew = encode(Renew([], NO_TOKEN))
        again.send(add_channel(CHANNEL, renew))
        command = dealer(context, f"ipc://{tmp_path}/router.sock")
        command.send(encode(STATUS))
        messages = read_until(router, renew)
        if encode(STATUS) not in [message.body for message in messages]:
            messages += read_until(router, encode(STATUS))
        again.send(add_channel(CHANNEL, encode(Withdraw(9))))  # and whatever came before
        messages += read_until(router, encode(Withdraw(9)))
        for sock in (again, command):
            sock.close()
    finally:
        router.close()
        context.term()
    session = PROCESS + CHANNEL
    assert {message.body for message in messages if message.session == session} >= {
        renew,
        encode(Withdraw(9)),
    }
    # Those that were read before its next connection was made are the session's.
    assert [message.body for message in messages if message.session != session] == [encode(STATUS)]

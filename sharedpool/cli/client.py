"""The client side of the commands: finding brokers, asking them, and printing tables."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import click
import zmq
from msgspec import structs

from sharedpool.discovery import address as addresses
from sharedpool.discovery.lock_file import is_held
from sharedpool.errors import BrokerUnavailable, ConfigError, ProtocolError
from sharedpool.wire.codec import decode_to_operator, encode
from sharedpool.wire.messages import PROTOCOL_VERSION
from sharedpool.wire.reports import FromOperator, Report, Status, ToOperator

ANSWER_LIMIT_S = 3.0
NOT_RUNNING = 3  # the exit status that `service status` and systemctl have for this

F = TypeVar("F", bound=Callable[..., Any])
A = TypeVar("A")
M = TypeVar("M", bound=ToOperator)


class BrokerClient:
    """A connection from a command to one broker."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._read = 0  # reports received: the broker sends only a few that are not read yet
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        # Without an explicit identity libzmq generates one. The broker would abort if another peer
        # had taken the same.
        self._dealer.setsockopt(zmq.IDENTITY, b"c" + os.urandom(15))
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.IPV6, 1)
        self._dealer.connect(address)

    def ask(self, question: FromOperator, kind: type[M], timeout_s: float = ANSWER_LIMIT_S) -> M:
        """Return the broker's answer. Raise `BrokerUnavailable` if none comes in `timeout_s`."""
        if isinstance(question, Status):
            question = structs.replace(question, read=self._read)
        self._dealer.send(encode(question))
        if (answer := self.receive(kind, timeout_s)) is None:
            text = f"no broker answers at {self.address} within {timeout_s:g} s"
            obstacle = addresses.obstacle(self.address)
            raise BrokerUnavailable(f"{text}: {obstacle}" if obstacle else text)
        return answer

    def receive(self, kind: type[M], timeout_s: float) -> M | None:
        """Return the next message of this kind, dropping others; None after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._dealer.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            message = decode_to_operator(self._dealer.recv())
            self._read += isinstance(message, Report)
            if isinstance(message, kind):
                return message
        return None

    def close(self) -> None:
        """Disconnect."""
        self._dealer.close()
        self._context.term()


@contextlib.contextmanager
def connected(address: str) -> Iterator[BrokerClient]:
    """Connect to a broker for the block.

    Raise `BrokerUnavailable` if the peer is no broker, or a broker of another version.
    """
    try:
        with contextlib.closing(BrokerClient(address)) as client:
            yield client
    except (zmq.ZMQError, ProtocolError) as error:
        raise BrokerUnavailable(
            f"no broker of this version answers at {address}: {error}"
        ) from None


def fetch_report(address: str, timeout_s: float = ANSWER_LIMIT_S) -> Report:
    """Return the state of a broker. Raise `BrokerUnavailable` if none comes in `timeout_s`."""
    with connected(address) as client:
        return client.ask(Status(PROTOCOL_VERSION), Report, timeout_s)


# --- which broker


def broker_option(command: F) -> F:
    """Add the option --broker."""
    option = click.option(
        "--broker",
        "address",
        envvar=addresses.BROKER_VARIABLE,
        show_envvar=True,
        help="The broker's address.",
    )
    return option(command)


def find_brokers(address: str | None) -> list[str]:
    """Return the addresses of the brokers to ask, perhaps none.

    That is the given address, or else every broker in the user's runtime directory. Raise click's
    usage error for a wrong address.
    """
    try:
        return [addresses.check_address(address, "--broker")] if address else _living()
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


def from_each(found: Sequence[str], ask: Callable[[str], A], *, as_json: bool = False) -> list[A]:
    """Return the answers of these brokers.

    Print an error for each broker that does not answer. If none does, exit with `NOT_RUNNING`.
    """
    answers = []
    for address in found:
        try:
            answers.append(ask(address))
        except BrokerUnavailable as error:
            click.echo(f"Error: {error}", err=True)
    if not answers:
        if as_json:
            click.echo("[]")
        if not found:
            click.echo(f"no broker is running in {addresses.runtime_dir()}", err=True)
        raise SystemExit(NOT_RUNNING)
    return answers


def _living() -> list[str]:
    """Return the addresses of this user's running brokers."""
    sockets = sorted(addresses.runtime_dir().glob("*.sock"))
    return [f"ipc://{path}" for path in sockets if is_held(addresses.lock_path(f"ipc://{path}"))]


# --- showing


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    # Names are chosen by programs: no control character may reach the terminal.
    rows = [[cell if cell.isprintable() else repr(cell)[1:-1] for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def duration(ms: int) -> str:
    """Return a duration for people to read; empty if it is not known (-1)."""
    seconds = ms / 1000
    if ms < 0:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"

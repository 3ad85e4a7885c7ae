"""The control connection by itself, with a listener in the ledger's place."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sharedpool.broker.core.commands import Command, RecordServer, ServerIncarnation
from sharedpool.broker.postgres.control import Control
from sharedpool.wire.values import Token


class Listener:
    """Stands for the loop and the ledger: notes what is reported."""

    def __init__(self) -> None:
        self.gone: queue.SimpleQueue[Token] = queue.SimpleQueue()  # whose backends are gone
        self.servers: list[ServerIncarnation] = []  # that are to be recorded
        self.control = self  # the part of the ledger that is told of the control connection

    def call_soon(self, call: Callable[[Any, float], list[Command]]) -> None:
        for command in call(self, 0.0):
            if isinstance(command, RecordServer):
                self.servers.append(command.server)

    def reached(self, now: float, *, direct: bool, fault: str) -> list[Command]:
        return []

    def limited(self, now: float, *, role: str, limit: int | None) -> list[Command]:
        return []

    def backend_gone(self, token: Token, now: float) -> list[Command]:
        self.gone.put(token)
        return []


@contextmanager
def running(dsn: str) -> Iterator[tuple[Control, Listener]]:
    listener = Listener()
    control = Control(dsn, None, "0badcafe", listener.call_soon)
    control.start()
    try:
        yield control, listener
    finally:
        control.stop()

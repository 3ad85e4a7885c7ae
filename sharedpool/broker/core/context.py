"""What all parts of the ledger share: the records, the alarms, and the commands decided so far."""

from __future__ import annotations

from sharedpool.broker.core.commands import Command, Log
from sharedpool.broker.core.slots import Slots
from sharedpool.broker.core.timers import Timers


class Context:
    """One broker's records, alarms and output. Each part of the ledger is constructed with it.

    `has_control_connection`: the server can be asked which backends it has.
    """

    def __init__(self, epoch: int, max_conn: int | None, *, has_control_connection: bool) -> None:
        self.epoch = epoch
        self.has_control_connection = has_control_connection
        self._commands: list[Command] = []
        self.emit = self._commands.append
        self.slots = Slots(max_conn, self.emit, epoch)
        self.timers = Timers(self.slots.is_over)

    def log(self, level: int, text: str, *args: object, **fields: object) -> None:
        """Emit one event for the log: a text, and fields that tell programs whom it concerns."""
        self.emit(Log(level, text % args, {"epoch": self.epoch, **fields}))

    def take_commands(self) -> list[Command]:
        """Return all commands since the last call."""
        commands = self._commands[:]
        self._commands.clear()
        return commands

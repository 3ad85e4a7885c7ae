"""Before an operator is told what is in use, the workers are asked for their state."""

from __future__ import annotations

from sharedpool.broker.core.commands import Command, Send
from sharedpool.broker.core.context import Context
from sharedpool.wire.messages import ReportNow

_MOST_ASKED = 500  # sessions that are asked at once for an operator's command


class FreshReports:
    """Asks for the reports; `awaited` are the sessions that have been asked and not answered."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._slots = context.slots
        self._emit = context.emit
        self.awaited: set[bytes] = set()

    def request(self) -> list[Command]:
        """Ask the workers that hold leases for their state; `awaited` have not answered yet.

        More than `_MOST_ASKED` are not asked: their last heartbeats have to do.
        """
        asked = [s for s in self._slots.sessions.values() if s.leases and not s.silent]
        if len(asked) <= _MOST_ASKED:
            for session in asked:
                self.awaited.add(session.id)
                self._emit(Send(session.id, ReportNow()))
        return self._context.take_commands()

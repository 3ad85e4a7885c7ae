"""What happens at the desk: workers deposit sockets, name backends, give connections, and hang up.

The desk (`server/desk.py`) is a Unix socket to which each worker program keeps a connection, its
*line*.
"""

from __future__ import annotations

from collections.abc import Callable

from sharedpool.broker.core.commands import Command
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.lease_messages import LeaseMessages
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.moves import Moves
from sharedpool.broker.core.sessions import Sessions
from sharedpool.wire.desk import Give, Opened
from sharedpool.wire.messages import Confirm
from sharedpool.wire.values import Token


class DeskEvents:
    """Handles the desk's events; `settle(now)` schedules, and returns what is to be done."""

    def __init__(
        self,
        context: Context,
        sessions: Sessions,
        leases: Leases,
        lease_messages: LeaseMessages,
        handover: Handover,
        moves: Moves,
        settle: Callable[[float], list[Command]],
    ) -> None:
        self._slots = context.slots
        self._take_commands = context.take_commands
        self._sessions = sessions
        self._leases = leases
        self._lease_messages = lease_messages
        self._handover = handover
        self._moves = moves
        self._settle = settle
        self._programs: dict[int, bytes] = {}  # by line: the program that ends with it

    def expects(self, session_id: bytes, token: Token) -> bool:
        """Return True if a session may deposit a socket for this lease."""
        session = self._slots.sessions.get(session_id)
        return session is not None and token in session.leases

    def deposited(self, token: Token, now: float) -> list[Command]:
        """Handle that the broker has the socket of a lease's connection."""
        self._leases.deposited(self._slots.leases[token], now)
        return self._settle(now)

    def opened(self, opened: Opened, now: float) -> list[Command]:
        """Handle that a worker names the backend of a new connection: a CONFIRM that comes sooner.

        If it comes later after all, the worker may have told more of the lease by then.
        """
        session = self._slots.sessions.get(opened.session)
        lease = None if session is None else session.leases.get(opened.token)
        if session is not None and lease is not None and lease.backend is None:
            if not (session.ended or session.restored):
                self._sessions.heard_from(session, now)
            self._lease_messages.confirm(session, Confirm(opened.token, opened.backend), now)
        return self._settle(now)

    def given(self, give: Give, now: float) -> list[Command]:
        """Handle a connection that its worker gives to be passed on."""
        self._moves.transit.sync(now)
        session = self._slots.sessions.get(give.session)
        if session is not None and not (session.ended or session.restored):
            self._sessions.heard_from(session, now)
            if self._handover.given(session, give, now):
                return self._take_commands()  # nothing is left to schedule
        return self._settle(now)

    def line_identified(self, program: bytes, line: int) -> None:
        """Record that a line ends with a program; the program's sessions have ids that start so."""
        self._programs[line] = program

    def line_leaving(self, line: int) -> None:
        """Record that a line is about to end while its program goes on."""
        self._programs.pop(line, None)

    def line_closed(self, line: int, now: float) -> list[Command]:
        """Handle the end of a line: unless it was leaving, its program has ended.

        The process may live on: it may have executed another program.
        """
        self._moves.transit.sync(now)
        program = self._programs.pop(line, None)
        if program is not None:
            for session in list(self._slots.sessions.values()):
                if session.id.startswith(program) and not session.ended:
                    self._sessions.end(session, "its worker ended", now)
        return self._settle(now)

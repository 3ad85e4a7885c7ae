"""Carry out the ledger's commands: one method or component for each type of `commands.Command`.

Journal entries and messages are collected while commands are carried out. `deliver` then writes
the journal before it sends: a grant that is not in the journal must not leave the broker.
"""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable, Iterable
from typing import Any

from sharedpool.broker.core.commands import (
    Admit,
    CancelBackend,
    ClaimLeadership,
    CloseLane,
    Command,
    Dismiss,
    Erase,
    Fence,
    Forget,
    GiveInLane,
    HaltMoves,
    InviteToLane,
    JoinQueue,
    LeaveShare,
    Log,
    MarkJournalComplete,
    OpenLane,
    PassOn,
    Record,
    RecordServer,
    ResignLeadership,
    Send,
    StartMoves,
    SurveyServer,
    SyncShare,
    TransferCustody,
    VerifyServer,
    Watch,
)
from sharedpool.broker.core.ledger import Ledger, LedgerCall
from sharedpool.broker.postgres.control import Control
from sharedpool.broker.postgres.share_sessions import ShareSessions
from sharedpool.broker.server.custody import Custody
from sharedpool.broker.server.desk import Desk
from sharedpool.broker.server.journal import Journal
from sharedpool.broker.server.lanes import Lanes
from sharedpool.broker.server.processes import WatchedProcesses
from sharedpool.broker.server.router_socket import RouterSocket
from sharedpool.wire.codec import encode
from sharedpool.wire.messages import ToWorker
from sharedpool.wire.reports import ToOperator

logger = logging.getLogger("sharedpool.broker")


class Executor:
    """Carries out the ledger's commands with the journal, the sockets and the control connection.

    `call_later(call)` queues a call of the ledger for the loop's next turn.
    """

    def __init__(
        self,
        ledger: Ledger,
        router: RouterSocket,
        journal: Journal,
        control: Control,
        shares: ShareSessions | None,
        desk: Desk | None,
        selector: selectors.BaseSelector,
        call_later: Callable[[LedgerCall], None],
    ) -> None:
        self._router = router
        self._journal = journal
        self._control = control
        self._call_later = call_later
        self._watched = WatchedProcesses(selector)
        self.lanes = Lanes(desk, ledger, selector, self.execute, call_later)
        self.custody = Custody(desk, self.lanes, ledger, control, self.execute, call_later)
        self._unsent: list[tuple[bytes, ToWorker | ToOperator]] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            # messages
            Send: self._send,
            Log: self._log,
            # the journal
            Record: self._record,
            Erase: self._erase,
            Admit: lambda command: journal.admit(command.member),
            Dismiss: lambda command: journal.dismiss(command.session),
            RecordServer: lambda command: journal.record_server(command.server),
            MarkJournalComplete: lambda _: journal.mark_complete(),
            # custody and lanes
            TransferCustody: lambda command: self.custody.transfer(command.token, command.heir),
            PassOn: self._after_delivery(self.lanes.pass_on),
            InviteToLane: self._after_delivery(self.lanes.invite),
            GiveInLane: self._after_delivery(self.lanes.give),
            OpenLane: self.lanes.open,
            CloseLane: self.lanes.close_lane,
            JoinQueue: self.lanes.join_queue,
            StartMoves: self.lanes.start_moves,
            HaltMoves: self.lanes.halt_moves,
            # the server
            Fence: self.custody.end_backend,
            CancelBackend: control.cancel_backend,
            SurveyServer: control.survey,
            VerifyServer: control.verify_server,
            ClaimLeadership: lambda _: control.claim_leadership(),
            ResignLeadership: lambda _: control.resign_leadership(),
            **_share_handlers(shares),
            # processes
            Watch: self._watch,
            Forget: self._forget,
        }

    def execute(self, commands: Iterable[Command]) -> None:
        """Carry out commands, then write and send what they have collected."""
        self.carry_out(commands)
        self.deliver()

    def carry_out(self, commands: Iterable[Command]) -> None:
        """Carry out commands; what is to be written and sent waits for `deliver`."""
        for command in commands:
            self._handlers[type(command)](command)

    def deliver(self) -> None:
        """Write the journal, then send the messages."""
        self._journal.flush()
        if self._unsent:
            for session, message in self._unsent:
                self._router.send(session, encode(message))
            self._unsent.clear()

    def send(self, session: bytes, message: ToWorker | ToOperator) -> None:
        """Collect a message for the next `deliver`."""
        self._unsent.append((session, message))

    def session_died(self, session: bytes) -> None:
        """Report a session whose process has ended.

        The report waits for a turn in which no message is left to read: a RELEASE that has already
        arrived is better evidence than the death.
        """
        self._watched.forget(session)
        self._call_later(lambda ledger, now: ledger.session_died(session, now))

    def stop_watching(self) -> None:
        """Close the pidfds of all workers."""
        self._watched.close()

    def _after_delivery(self, carry_out: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return a handler that delivers first: a socket must not overtake the journal's entry."""

        def handler(command: Any) -> None:
            self.deliver()
            carry_out(command)

        return handler

    def _send(self, command: Send) -> None:
        self._unsent.append((command.session, command.message))

    @staticmethod
    def _log(command: Log) -> None:
        logger.log(command.level, "%s", command.text, extra={"sharedpool": command.fields})

    def _record(self, command: Record) -> None:
        self._journal.record(command.entry)
        if command.entry.backend is not None:
            self._control.note_server(command.entry.backend.boot_us)

    def _erase(self, command: Erase) -> None:
        self._journal.erase(command.token)
        self.custody.erase(command.token)

    def _forget(self, command: Forget) -> None:
        self._watched.forget(command.session)
        self.lanes.session_ended(command.session)

    def _watch(self, command: Watch) -> None:
        if not self._watched.watch(command.session, command.process):
            self.session_died(command.session)


def _share_handlers(shares: ShareSessions | None) -> dict[type, Callable[[Any], None]]:
    return {} if shares is None else {SyncShare: shares.sync, LeaveShare: shares.leave}

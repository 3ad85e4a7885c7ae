"""Handle what happens at the desk, and what the ledger decides about sockets in custody.

The desk (`desk.py`) knows sockets and packets, the ledger knows leases. `Custody` calls the ledger
for each event of the desk, and carries the ledger's decisions out on the desk's sockets.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable

from msgspec import structs

from sharedpool.broker.core.commands import Command, Fence
from sharedpool.broker.core.ledger import Ledger, LedgerCall
from sharedpool.broker.postgres.control import Control
from sharedpool.broker.server.desk import Desk
from sharedpool.broker.server.lanes import Lanes
from sharedpool.wire.desk import Give, Opened
from sharedpool.wire.values import Token

# Time for a backend to exit after `shutdown()`, before the control connection terminates it.
_CUT_HEAD_START_S = 0.02


class Custody:
    """The sockets in custody; `desk` is None where there can be no desk.

    `execute` carries out the ledger's commands. `call_later(call)` queues a call of the ledger for
    the loop's next turn.
    """

    def __init__(
        self,
        desk: Desk | None,
        lanes: Lanes,
        ledger: Ledger,
        control: Control,
        execute: Callable[[list[Command]], None],
        call_later: Callable[[LedgerCall], None],
    ) -> None:
        self.desk = desk
        self._lanes = lanes
        self._ledger = ledger
        self._control = control
        self._execute = execute
        self._call_later = call_later
        self._fenced: set[Token] = set()  # fences queued at the control connection

    def __len__(self) -> int:
        return 0 if self.desk is None else len(self.desk)

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Have the desk's lines and the sockets in custody watched by the loop's selector."""
        if (desk := self.desk) is not None:
            selector.register(desk.lines, selectors.EVENT_READ, lambda: desk.receive(self))
            selector.register(desk.custody, selectors.EVENT_READ, lambda: desk.check_custody(self))

    # --- events of the desk (`desk.DeskHandler`)

    def expects(self, session: bytes, token: Token) -> bool:
        """Return True if a session may deposit a socket for this lease."""
        return self._ledger.desk.expects(session, token)

    def deposited(self, token: Token) -> None:
        """Handle a socket that has come into custody."""
        self._execute(self._ledger.desk.deposited(token, time.monotonic()))

    def opened(self, opened: Opened) -> None:
        """Handle that a worker names the backend of a new connection."""
        self._execute(self._ledger.desk.opened(opened, time.monotonic()))

    def given(self, give: Give) -> None:
        """Handle a connection that its worker gives to be passed on."""
        self._execute(self._ledger.desk.given(give, time.monotonic()))

    def line_leaving(self, line: int) -> None:
        """Record that a line is about to close although its program goes on."""
        self._ledger.desk.line_leaving(line)

    def line_identified(self, program: bytes, line: int) -> None:
        """Record which program a line belongs to: it ends when that program does."""
        self._ledger.desk.line_identified(program, line)
        self._lanes.line_identified(program, line)

    def joined(self, session: bytes, *, takes_part: bool) -> None:
        """Handle a session's answer to the invitation into its pool's lane."""
        self._execute(self._ledger.lanes.joined(session, time.monotonic(), takes_part=takes_part))

    def line_closed(self, line: int) -> None:
        """Handle a closed line.

        The ledger is told later: this may happen while its earlier commands are being carried out.
        """
        self._lanes.line_closed(line)
        self._call_later(lambda ledger, now: ledger.desk.line_closed(line, now))

    def peer_closed(self, token: Token) -> None:
        """Handle a socket that its other side has closed: the backend itself, or a proxy."""
        now = time.monotonic()
        if self._ledger.believes(token):
            self._execute(self._ledger.backend_gone(token, now))
        else:
            self._execute(self._ledger.ended_without_proof(token, now, peer_closed=True))

    def socket_died(self, token: Token) -> None:
        """Handle a socket that has died: only the server knows whether its backend lives on."""
        self._execute(self._ledger.ended_without_proof(token, time.monotonic()))

    # --- commands of the ledger

    def transfer(self, token: Token, heir: Token) -> None:
        """Keep a lease's socket for another lease."""
        assert self.desk is not None
        self.desk.transfer(token, heir)

    def erase(self, token: Token) -> None:
        """Drop the socket and the fence of a lease whose slot is free."""
        if token in self._fenced:
            self._fenced.discard(token)
            self._control.forget_fence(token)
        if self.desk is not None:
            self.desk.drop(token)

    def end_backend(self, fence: Fence) -> None:
        """End a backend: by its socket if that is in custody, and by the control connection.

        The control connection is not needed where the socket shows the backend's exit by itself.
        """
        cut = self.desk is not None and self.desk.cut(fence.token)
        if fence.backend is None:
            return
        exit_is_visible = cut and fence.backend.direct
        if self._control.exists or not exit_is_visible:
            self._fenced.add(fence.token)
            self._control.enqueue_fence(
                structs.replace(fence, left=fence.left or cut),
                after_s=_CUT_HEAD_START_S if exit_is_visible else 0.0,
            )

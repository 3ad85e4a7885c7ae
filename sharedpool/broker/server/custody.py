"""Between the desk and the ledger: what is said and seen there, and what is to be done with the sockets in custody."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from sharedpool.broker.core.commands import Command, Fence
from sharedpool.broker.core.ledger import Ledger, LedgerCall
from sharedpool.broker.postgres.control import Control
from sharedpool.broker.server.desk import Desk
from sharedpool.broker.server.lanes import Lanes
from sharedpool.wire.desk import Give
from sharedpool.wire.messages import Token

# What a cut does by itself, it does by then.
_CUT_HEAD_START_S = 0.02


class Custody:
    """The desk's clerk; `desk` is None where there can be no desk. `lanes` is set once they are made.

    `execute` carries out what the ledger decides, `call_soon` has the ledger told once that is done.
    """

    lanes: Lanes

    def __init__(
        self,
        desk: Desk | None,
        ledger: Ledger,
        control: Control,
        execute: Callable[[list[Command]], None],
        call_soon: Callable[[LedgerCall], None],
    ) -> None:
        self.desk = desk
        self._ledger = ledger
        self._control = control
        self._execute = execute
        self._call_soon = call_soon
        self._fenced: set[Token] = set()  # given to the control connection
        if desk is not None:
            desk.handler = self

    def __len__(self) -> int:
        return 0 if self.desk is None else len(self.desk)

    # --- from the desk (`desk.DeskHandler`)

    def expects(self, session: bytes, token: Token) -> bool:
        """Say whether a socket may be handed in for a lease."""
        return self._ledger.expects(session, token)

    def deposited(self, token: Token) -> None:
        """Take in that a lease's socket is in custody."""
        self._execute(self._ledger.deposited(token, time.monotonic()))

    def given(self, give: Give) -> None:
        """Take in a connection that is to be passed on."""
        self._execute(self._ledger.given(give, time.monotonic()))

    def line_leaving(self, line: int) -> None:
        """Take in that this line is to end, and its program goes on."""
        self._ledger.line_leaving(line)

    def line_identified(self, program: bytes, line: int) -> None:
        """Take in that this line ends with a program."""
        self._ledger.line_identified(program, line)
        self.lanes.line_identified(program, line)

    def joined(self, session: bytes, *, takes_part: bool) -> None:
        """Take in that a session uses its pool's lane, or will not."""
        self._execute(self._ledger.joined(session, time.monotonic(), takes_part=takes_part))

    def line_closed(self, line: int) -> None:
        """Take in that a line has ended; not at once, what was decided before is still being carried out."""
        self.lanes.line_closed(line)
        self._call_soon(lambda ledger, now: ledger.line_closed(line, now))

    def gone(self, token: Token) -> None:
        """Take in that the other side of a socket in custody has closed it: the backend, if nobody is in between."""
        now = time.monotonic()
        if self._ledger.believes(token):
            self._execute(self._ledger.backend_gone(token, now))
        else:
            self._execute(self._ledger.backend_lost(token, now, closed=True))

    def lost(self, token: Token) -> None:
        """Take in that a socket in custody has died: whether its backend lives on, only the server knows."""
        self._execute(self._ledger.backend_lost(token, time.monotonic()))

    # --- from the ledger

    def transfer(self, token: Token, heir: Token) -> None:
        """Keep a lease's socket for another lease."""
        assert self.desk is not None
        self.desk.transfer(token, heir)

    def erase(self, token: Token) -> None:
        """Let go of what there is of a lease: its slot is free."""
        if token in self._fenced:
            self._fenced.discard(token)
            self._control.forget_fence(token)
        if self.desk is not None:
            self.desk.drop(token)

    def end_backend(self, fence: Fence) -> None:
        """Have a backend ended: by its socket, if that is here, and by the control connection."""
        cut = self.desk is not None and self.desk.cut(fence.token)
        if fence.backend is None:
            return
        seen = cut and fence.backend.direct  # its end will show
        if self._control.exists or not seen:
            self._fenced.add(fence.token)
            self._control.enqueue_fence(
                replace(fence, left=fence.left or cut), after_s=_CUT_HEAD_START_S if seen else 0.0
            )

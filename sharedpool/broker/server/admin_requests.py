"""Answer the command line: reports (`status`, `who`, `top`) and orders (`pause`, `kill`, …).

A report with leases waits for a moment until the workers have told what they do.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from msgspec import structs

from sharedpool.broker.core.commands import Command, QueryActivity, Send
from sharedpool.broker.core.ledger import Ledger
from sharedpool.broker.postgres.control import Control
from sharedpool.wire.admin import Done, Order
from sharedpool.wire.reports import Report, Status

# How long a command waits for the workers, and for the server.
_WORKERS_LIMIT_S = 0.2
_SERVER_LIMIT_S = 2.0
# Answers are big and are buffered here: a command that does not read them gets no more.
_MOST_UNREAD = 8
_MOST_KNOWN = 1000


class AdminRequests:
    """The requests of commands; `execute` carries out the ledger's commands, `report` reports."""

    def __init__(
        self,
        ledger: Ledger,
        control: Control,
        execute: Callable[[list[Command]], None],
        report: Callable[[float], Report],
    ) -> None:
        self._ledger = ledger
        self._control = control
        self._execute = execute
        self._report = report
        self._waiting: deque[tuple[bytes, Status, float]] = deque()
        self._answered: OrderedDict[bytes, int] = OrderedDict()  # number of answers, by asker

    def ask(self, asker: bytes, status: Status, now: float) -> None:
        """Queue a request for `answer`. For leases the workers are asked to report theirs."""
        answered = self._answered.get(asker, 0)
        if answered - status.read >= _MOST_UNREAD:
            return
        self._answered[asker] = answered + 1
        self._answered.move_to_end(asker)
        if len(self._answered) > _MOST_KNOWN:
            self._answered.popitem(last=False)
        if status.leases:
            self._execute(self._ledger.fresh_reports.request())
        self._waiting.append((asker, status, now + _WORKERS_LIMIT_S))

    def answer(self, now: float) -> None:
        """Answer the queued requests; those with leases wait a moment for the workers' reports."""
        if not self._waiting:
            return
        while self._waiting:
            asker, status, limit = self._waiting[0]
            if status.leases and self._ledger.fresh_reports.awaited and now < limit:
                return
            self._waiting.popleft()
            self._tell_state(asker, status, now)
        self._ledger.fresh_reports.awaited.clear()

    def next_deadline(self) -> float | None:
        """Return when `answer` has something to do at the latest."""
        return self._waiting[0][2] if self._waiting else None

    def order(self, operator: bytes, order: Order, now: float, *, near: bool) -> None:
        """Carry out an order, and answer; `near`: it came from this host."""
        if not near:
            self._execute(
                [Send(operator, Done([], "orders are accepted only from the broker's own host"))]
            )
            return
        done, commands = self._ledger.order(order, now)
        self._execute([*commands, Send(operator, done)])

    def _tell_state(self, asker: bytes, status: Status, now: float) -> None:
        """Send a report. What the server says of its leases follows from the control connection."""
        oldest = self._ledger.oldest_leases(status.leases, now)
        backends = tuple(line.backend for line in oldest if line.backend is not None)
        asks = bool(backends) and self._control.exists
        self._execute(
            [Send(asker, structs.replace(self._report(now), oldest=oldest, activity=asks))]
        )
        if asks:
            self._control.query_activity(QueryActivity(asker, backends, now + _SERVER_LIMIT_S))

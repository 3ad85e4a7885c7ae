"""Let other threads take snapshots of the broker: they ask, and its loop copies.

The loop owns the ledger, so no other thread may read it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future

from sharedpool.broker.core.commands import Command
from sharedpool.broker.core.ledger import Ledger, LedgerCall
from sharedpool.broker.core.snapshot import Snapshot
from sharedpool.broker.metrics.http_server import HttpServer
from sharedpool.discovery.address import check_metrics_address
from sharedpool.wire.reports import Report


class MetricsService:
    """The metrics of one broker.

    `call_soon(call)` has the loop call the ledger, `report(now)` is called there.
    """

    def __init__(
        self,
        address: str,
        call_soon: Callable[[LedgerCall], None],
        report: Callable[[float], Report],
    ) -> None:
        self._call_soon = call_soon
        self._report = report
        """Listen at `address`; raise `SharedPoolError` if that fails."""
        self._asked: set[Future[Snapshot]] = set()
        self._over = False
        self._server = HttpServer(*check_metrics_address(address, "--metrics"), self.snapshot)

    def start(self) -> None:
        """Begin to answer requests; the loop is about to run."""
        self._server.start()

    def stop(self) -> None:
        """Stop. Called by the loop's thread, at its end."""
        self._over = True
        for answer in list(self._asked):
            answer.cancel()
        self._server.stop()

    def snapshot(self, limit_s: float) -> Snapshot:
        """Return a snapshot of the broker; for any thread but the loop's.

        Blocks at most `limit_s`, then raises `TimeoutError`.
        """
        answer: Future[Snapshot] = Future()
        self._asked.add(answer)
        try:
            # First add, then look: `stop` first sets the flag, then cancels what was added.
            if self._over:
                raise CancelledError
            self._call_soon(lambda ledger, now: self._answer(answer, ledger, now))
            return answer.result(limit_s)
        except CancelledError:
            raise TimeoutError("the broker is ending") from None
        finally:
            self._asked.discard(answer)

    def _answer(self, answer: Future[Snapshot], ledger: Ledger, now: float) -> list[Command]:
        try:
            answer.set_result(ledger.snapshot(self._report(now), now))
        except Exception as error:  # a bug must not end the loop: raise it in the asking thread
            answer.set_exception(error)
        return []

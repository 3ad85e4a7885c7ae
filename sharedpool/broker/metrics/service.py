"""What the metrics' threads want to see of the broker: they ask, its loop makes a copy and hands it over."""

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
    """The metrics at `address`. `call_soon` has the loop carry out a word, `report` is called in it.

    Listens once it is made; raise `SharedPoolError` when the address cannot be had.
    """

    def __init__(
        self,
        address: str,
        call_soon: Callable[[LedgerCall], None],
        report: Callable[[float], Report],
    ) -> None:
        self._call_soon = call_soon
        self._report = report
        self._asked: set[Future[Snapshot]] = set()
        self._over = False
        self._server = HttpServer(*check_metrics_address(address, "--metrics"), self.snapshot)

    def start(self) -> None:
        """Begin to answer; the loop is about to run."""
        self._server.start()

    def stop(self) -> None:
        """Answer no more. Called by the loop's thread, at its end."""
        self._over = True
        for answer in list(self._asked):
            answer.cancel()
        self._server.stop()

    def snapshot(self, limit_s: float) -> Snapshot:
        """Return the broker as its loop sees it. Blocks at most `limit_s`, then raises `TimeoutError`.

        For any thread but the loop's.
        """
        answer: Future[Snapshot] = Future()
        self._asked.add(answer)
        try:
            if (
                self._over
            ):  # looked at after it is among the asked: `stop` does it the other way round
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
        except (
            Exception
        ) as error:  # a bug here must not end the broker: it is raised where it was asked for
            answer.set_exception(error)
        return []

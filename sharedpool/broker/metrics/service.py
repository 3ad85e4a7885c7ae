"""What the metrics' threads want to see of the broker: they ask, its loop makes a copy and hands it over."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future

from sharedpool.broker.core.commands import Command
from sharedpool.broker.core.ledger import Ledger, Word
from sharedpool.broker.core.snapshot import Observation
from sharedpool.broker.metrics.http_server import Web
from sharedpool.discovery.address import check_metrics_address
from sharedpool.wire.reports import Report


class Lookout:
    """The metrics at `address`. `tell` has the loop carry out a word, `report` is called in it.

    Listens once it is made; raise `SharedPoolError` when the address cannot be had.
    """

    def __init__(self, address: str, tell: Callable[[Word], None], report: Callable[[float], Report]) -> None:
        self._tell = tell
        self._report = report
        self._asked: set[Future[Observation]] = set()
        self._over = False
        self._web = Web(*check_metrics_address(address, "--metrics"), self.look)

    def start(self) -> None:
        """Begin to answer; the loop is about to run."""
        self._web.start()

    def stop(self) -> None:
        """Answer no more. Called by the loop's thread, at its end."""
        self._over = True
        for answer in list(self._asked):
            answer.cancel()
        self._web.stop()

    def look(self, limit_s: float) -> Observation:
        """Return the broker as its loop sees it. Blocks at most `limit_s`, then raises `TimeoutError`.

        For any thread but the loop's.
        """
        answer: Future[Observation] = Future()
        self._asked.add(answer)
        try:
            if self._over:  # looked at after it is among the asked: `stop` does it the other way round
                raise CancelledError
            self._tell(lambda ledger, now: self._show(answer, ledger, now))
            return answer.result(limit_s)
        except CancelledError:
            raise TimeoutError("the broker is ending") from None
        finally:
            self._asked.discard(answer)

    def _show(self, answer: Future[Observation], ledger: Ledger, now: float) -> list[Command]:
        try:
            answer.set_result(ledger.observe(self._report(now), now))
        except Exception as error:  # a bug here must not end the broker: it is raised where it was asked for
            answer.set_exception(error)
        return []

"""`sharedpool demo`: many processes move money through few connections on a real PostgreSQL.

Nothing is left behind, not even after SIGKILL. All files lie in the directory of the throw-away
server, whose watchdog removes it. Workers and broker end when their pipe to this process closes.

A signal only sets a flag, which is checked between two steps, so nothing is interrupted half-way.
The exception is the server's start, which takes longest, and which an exception may interrupt.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import Any, Self

import click
import psycopg2

from sharedpool.broker.launch.run import start_broker
from sharedpool.cli.client import fetch_report
from sharedpool.cli.demo.view import (
    Moment,
    Rate,
    Summary,
    View,
    as_document,
    as_text,
    choose_view,
    judge,
)
from sharedpool.cli.demo.workers import ACCOUNTS, GET_CONN_LIMIT_S, WorkerFleet, shielded_children
from sharedpool.errors import SharedPoolError
from sharedpool.postgres.throwaway_server import EphemeralPostgres, PostgresFailed, PostgresNotFound
from sharedpool.wire.reports import PoolReport

_OPENING_BALANCE = 1000
_FRAME_S = 0.1
_SAMPLE_EVERY_S = 0.005
_START_LIMIT_S = 60.0
_LEAVE_LIMIT_S = 5.0
_OBSERVER = "sharedpool demo observer"

_SCHEMA_SQL = """
CREATE TABLE accounts (
    id int PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0), moves bigint NOT NULL
);
INSERT INTO accounts SELECT id, %s, 0 FROM generate_series(1, %s) AS id;
"""
# All but the known others, so that a backend counts that is still starting and has no name yet.
_COUNT_SQL = """
SELECT count(*) FROM pg_stat_activity
WHERE backend_type = 'client backend'
    AND application_name NOT LIKE 'sharedpool broker%%'
    AND application_name NOT LIKE 'sharedpool-shares %%' AND application_name <> %s
"""


@click.command()
@click.option(
    "--workers", type=click.IntRange(min=1), default=16, show_default=True, help="Worker processes."
)
@click.option(
    "--max-conn",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="The limit that they share.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, max=86400, min_open=True),
    default=8,
    show_default=True,
    help="How long they work.",
)
@click.option("--plain", is_flag=True, help="Lines instead of the live view.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def demo(workers: int, max_conn: int, seconds: float, plain: bool, as_json: bool) -> None:
    """Watch many processes share few connections.

    The demo starts a throw-away PostgreSQL, a broker, and worker processes that move money between
    accounts. Exit status 0 only if PostgreSQL itself never had more connections than the limit, no
    money was lost and nothing failed. Nothing is left behind, not even after Ctrl-C.
    """
    # libpq's variables are for the user's own server, and child processes would inherit them.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    try:
        with _Signals() as signals:
            summary = _run(workers, max_conn, seconds, choose_view(plain), signals)
            signals.check()
    except _Stopped as stopped:
        click.echo(
            f"\nstopped by {stopped.signal.name}: processes, server and files are gone", err=True
        )
        raise SystemExit(128 + stopped.signal) from None
    except (PostgresNotFound, PostgresFailed, psycopg2.Error) as error:
        raise click.ClickException(str(error).strip()) from error
    click.echo(json.dumps(as_document(summary), indent=2) if as_json else as_text(summary))
    if not all(condition.holds for condition in judge(summary)):
        raise SystemExit(1)


def _run(workers: int, max_conn: int, seconds: float, view: View, signals: _Signals) -> Summary:
    """Start everything, watch it for `seconds`, stop it, and return the summary."""
    with contextlib.ExitStack() as stack:
        # Room for the control connection, the observer, and PostgreSQL's reserved connections.
        server = EphemeralPostgres(max_connections=max_conn + 10)
        stack.callback(server.stop)
        click.echo("starting PostgreSQL …", err=True)
        with signals.raising():
            server.start()
        address = f"ipc://{server.directory}/broker.sock"
        with shielded_children():
            stack.enter_context(start_broker(max_conn, address=address, dsn=server.dsn))
        signals.check()
        observer = _Observer(server.dsn)
        stack.callback(observer.close)
        before = observer.balance()
        fleet = WorkerFleet(signals.check)
        stack.callback(fleet.end)
        click.echo(f"starting {workers} processes …", err=True)
        fleet.start(workers, address, server.dsn, max_conn)
        fleet.wait_for(lambda worker: worker.ready, _START_LIMIT_S)
        if not all(worker.ready for worker in fleet.workers):
            raise click.ClickException(f"not every worker was ready after {_START_LIMIT_S:.0f} s")
        observer.start()
        elapsed_s = _watch(fleet, observer, address, Moment(0, seconds, workers, max_conn), view)
        fleet.send("stop")
        fleet.wait_for(lambda worker: worker.done, GET_CONN_LIMIT_S + 5)
        _, pool = _pool_report(address)
        fleet.send("leave")
        fleet.wait_for(lambda worker: worker.gone, _LEAVE_LIMIT_S)
        observer.stop()
        errors = sum((m.errors for m in fleet.workers), Counter[str]())
        errors["worker lost"] = sum(not m.done for m in fleet.workers)
        errors["broker without an answer"] = int(pool is None)
        errors["observer failed"] = int(observer.failed)
        waits = sorted(wait for m in fleet.workers for wait in m.waits)
        return Summary(
            workers=workers,
            max_conn=max_conn,
            elapsed_s=elapsed_s,
            peak=observer.peak,
            samples=observer.samples,
            gap_ms=observer.gap_s * 1000,
            committed=sum(m.committed for m in fleet.workers),
            transfers=observer.transfers(),
            idle_workers=sum(not m.committed for m in fleet.workers),
            wait_p50_ms=_percentile_ms(waits, 0.50),
            wait_p99_ms=_percentile_ms(waits, 0.99),
            recalls=pool.recalls if pool else 0,
            errors=dict(+errors),
            balance_before=before,
            balance_after=observer.balance(),
        )


def _watch(
    fleet: WorkerFleet, observer: _Observer, address: str, first: Moment, view: View
) -> float:
    """Let the workers work, and show it. Return for how many seconds they did."""
    rate = Rate()
    fleet.send("go")
    started = time.monotonic()
    with view:
        while True:
            elapsed_s = time.monotonic() - started
            committed = sum(m.committed for m in fleet.workers)
            answering, pool = _pool_report(address)
            moment = replace(
                first,
                elapsed_s=elapsed_s,
                answering=answering,
                server_now=observer.now,
                server_peak=observer.peak,
                samples=observer.samples,
                committed=committed,
                per_second=rate.of(committed),
                errors=sum(m.errors.total() for m in fleet.workers),
            )
            if pool is not None:
                moment = replace(
                    moment,
                    in_use=pool.in_use,
                    idle=pool.idle,
                    connecting=pool.granted,
                    closing=pool.closing,
                    unsure=pool.suspect + pool.fencing,
                    waiting=pool.waiting,
                    recalls=pool.recalls,
                )
            view.show(moment)
            if elapsed_s >= first.seconds or all(worker.gone for worker in fleet.workers):
                return elapsed_s
            fleet.wait_for(lambda worker: worker.gone, min(_FRAME_S, first.seconds - elapsed_s))


def _pool_report(address: str) -> tuple[bool, PoolReport | None]:
    """Ask the broker about the workers' pool.

    Return whether it answers, and its report on the pool, or None before any worker has registered.
    """
    try:
        return True, next(iter(fetch_report(address, 1.0).pools), None)
    except SharedPoolError:
        return False, None


def _percentile_ms(ordered: list[float], fraction: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))] * 1000 if ordered else 0.0


# --- signals


class _Stopped(BaseException):
    """The user wants the demo to end."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


class _Signals:
    """Records the first signal that ends the demo. `check` raises `_Stopped` for it."""

    def __init__(self) -> None:
        self._caught: int | None = None
        self._raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._caught is None:
            self._caught = number
            if self._raise:
                raise _Stopped(number)

    def check(self) -> None:
        """Raise `_Stopped` if a signal has come."""
        if self._caught is not None:
            raise _Stopped(self._caught)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Inside this block, raise `_Stopped` at the moment that a signal comes."""
        self._raise = True
        try:
            self.check()
            yield
        finally:
            self._raise = False


# --- the server's view


class _Observer:
    """Samples pg_stat_activity all the time, in a thread, over a connection of its own."""

    def __init__(self, dsn: str) -> None:
        self._conn = psycopg2.connect(dsn, application_name=_OBSERVER)
        self._conn.autocommit = True
        with self._conn.cursor() as cursor:
            cursor.execute(_SCHEMA_SQL, (_OPENING_BALANCE, ACCOUNTS))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._observe, name="demo-observer", daemon=True)
        self.now = self.peak = self.samples = 0
        self.gap_s = 0.0
        self.failed = False

    def start(self) -> None:
        """Start to sample. Nothing else may use the connection until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def close(self) -> None:
        """Stop sampling and disconnect."""
        self.stop()
        self._conn.close()

    def balance(self) -> int:
        """Return the sum of all accounts."""
        return self._number("SELECT sum(balance)::bigint FROM accounts")

    def transfers(self) -> int:
        """Return the number of transfers by the table, where each counts in two accounts."""
        return self._number("SELECT sum(moves)::bigint / 2 FROM accounts")

    def _observe(self) -> None:
        last = time.monotonic()
        try:
            while not self._stopping.wait(_SAMPLE_EVERY_S):
                self.now = self._number(_COUNT_SQL, _OBSERVER)
                self.peak = max(self.peak, self.now)
                now = time.monotonic()
                self.gap_s, last = max(self.gap_s, now - last), now
                self.samples += 1
        except psycopg2.Error:
            self.failed = True

    def _number(self, query: str, *arguments: object) -> int:
        with self._conn.cursor() as cursor:
            cursor.execute(query, arguments)
            row = cursor.fetchone()
        assert row is not None, "bug: a query returned no row"
        return int(row[0])

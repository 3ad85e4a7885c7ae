"""End backends, and find out when they are gone: only then are their slots free.

A slot is freed when `pg_stat_activity`, on the very server that the backend ran on, does not list
(pid, backend_start) any more. Where workers connect directly the broker sees most ends on its
sockets, and this comes second. Behind a proxy it is the only evidence, so the server is asked again
and again until each case is settled.

What is done with a backend depends on two things:

1. Its client has left (`Fence.left`): it is given a moment to exit by itself, then terminated.
   Otherwise it is terminated at once.
2. A *pooler* that keeps sessions (PgBouncer in session mode) does not end the backend when its
   client leaves. It cleans it and gives it to another client, which must not lose it. Such a
   backend is not ours any more once it has begun a query after our client's end, or is idle under
   another application_name. It is terminated only while neither is the case.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import psycopg2
from psycopg2.extensions import connection

from sharedpool.broker.core.commands import Fence
from sharedpool.broker.postgres import statements
from sharedpool.broker.postgres.statements import ListedBackend
from sharedpool.wire.values import Backend, Token

logger = logging.getLogger("sharedpool.broker")

# The pause between two looks at the same backend.
_FIRST_RETRY_S, _LAST_RETRY_S = 0.005, 0.05
_TOGETHER_S = 0.005  # jobs that are due so soon share a query
# How long a backend may take to exit after its client has left, and a pooler to clean it.
_LEAVES_S, _CLEANED_S = 0.02, 0.1
# A pooler may have given an idle backend to a worker that has not reported it yet.
_IDLE_S = 1.0
_EVER_US = 2**62
# A backend leaves the list before it leaves the server: after that it gives its place back, writes
# to the log and exits. No query shows when that is done. A process that has no more to do has done
# it after `_EXITS_S`; on a busy server it waits for a processor as long as our query did, so the
# query's own time, times eight, is the measure if it is longer.
_EXITS_S, _EXITS_QUERIES, _EXITS_LIMIT_S = 0.02, 8, 0.5


@dataclass(slots=True)
class _Job:
    """One backend that is to be gone."""

    fence: Fence
    due: float  # when it is looked at next
    ends_at: float  # when it is terminated
    retry_s: float = _FIRST_RETRY_S
    # The server's clock at the first look. Behind a pooler a query that begins later is another
    # client's.
    since_us: int | None = None
    unlisted: bool = False  # the server does not list it any more; it is about to exit
    warned: bool = False


class Fencing:
    """The backends that are to be gone.

    `done(token)` is called when a slot is free. `is_server_gone(backend)` returns True if the
    server that a backend was on is known to have been restarted, or replaced, since.
    """

    def __init__(
        self, done: Callable[[Token], None], is_server_gone: Callable[[Backend], bool]
    ) -> None:
        self._done = done
        self._is_server_gone = is_server_gone
        self._jobs: dict[Token, _Job] = {}
        self._powerless = False

    def add(self, fence: Fence, due: float) -> None:
        """Add a fence; nothing is done before `due`."""
        patience_s = 0.0
        if fence.left and fence.backend is not None and not fence.backend.direct:
            patience_s = _LEAVES_S if fence.backend.pooled is None else _CLEANED_S
        self._jobs[fence.token] = _Job(fence, due, due + patience_s)

    def discard(self, token: Token) -> None:
        """Forget a fence: other evidence has come."""
        self._jobs.pop(token, None)

    @property
    def due(self) -> float:
        """When `work` next has something to do."""
        return min((job.due for job in self._jobs.values()), default=math.inf)

    def work(self, conn: connection, boot_us: int, now: float) -> None:
        """Do what is due, on the server that was started at `boot_us`. Raise psycopg2's errors."""
        due = [job for job in self._jobs.values() if job.due <= now + _TOGETHER_S]
        if not any(job.due <= now for job in due):
            return
        for job in [job for job in due if job.unlisted and job.due <= now]:
            self._finish(job, "gone")
        due = [job for job in due if not job.unlisted]
        comparable = [
            (job, backend) for job in due if (backend := self._comparable(job, boot_us)) is not None
        ]
        exits_s = self._look(conn, comparable, now) if comparable else _EXITS_S
        for job in due:
            job.due = now + (exits_s if job.unlisted else job.retry_s)
            job.retry_s = min(job.retry_s * 2, _LAST_RETRY_S)

    def _look(self, conn: connection, jobs: list[tuple[_Job, Backend]], now: float) -> float:
        """Terminate backends and list them; return how long an unlisted one may take to exit."""
        self._end_ripe(conn, [(job, backend) for job, backend in jobs if job.ends_at <= now], now)
        began = time.monotonic()
        listed = statements.listed(conn, [backend.pid for _, backend in jobs])
        took_s = time.monotonic() - began
        for job, backend in jobs:
            sight = listed.get(backend.pid)
            # Start time 0: this role may not see it, so it may be the same backend.
            job.unlisted = sight is None or sight.start_us not in (backend.start_us, 0)
            if sight is not None and not job.unlisted and _is_lent_again(job, backend, sight):
                self._finish(job, "is its pooler's again")
        return min(max(_EXITS_S, _EXITS_QUERIES * took_s), _EXITS_LIMIT_S)

    def _end_ripe(self, conn: connection, ripe: list[tuple[_Job, Backend]], now: float) -> None:
        """Terminate the backends that have had the time to exit by themselves."""
        self._end(conn, [backend for _, backend in ripe if backend.pooled is None])
        for job, backend in ripe:
            if backend.pooled is not None and not job.fence.left:
                self._end(conn, [backend], _EVER_US)  # our client is there: all queries are its own
            elif backend.pooled is not None and job.since_us is not None:
                self._end(conn, [backend], job.since_us, idle=now >= job.ends_at + _IDLE_S)

    def _end(
        self,
        conn: connection,
        backends: list[Backend],
        since_us: int | None = None,
        *,
        idle: bool = True,
    ) -> None:
        """Terminate backends; one by one if the server refuses that for all of them together.

        With `since_us` the only backend is a pooler's: it is terminated if it has begun no query
        since, and has the session's own name; while it is idle, only if `idle`.
        """
        if not backends:
            return
        try:
            if since_us is None:
                statements.end(conn, backends)
            else:
                statements.end_lent(conn, backends[0], since_us, idle=idle)
        except (psycopg2.errors.InsufficientPrivilege, psycopg2.DataError) as error:
            if len(backends) > 1:
                for backend in backends:
                    self._end(conn, [backend])
            elif not self._powerless:
                self._powerless = True
                text = (
                    "control connection: may not end backends (%s): their slots stay occupied until"
                    " they exit"
                )
                logger.warning(text, str(error).strip())

    def _comparable(self, job: _Job, boot_us: int) -> Backend | None:
        """Return a job's backend if this server can tell whether it is gone.

        If the server was restarted or replaced the job is finished.
        """
        backend = job.fence.backend
        if backend is not None and backend.start_us and backend.boot_us == boot_us:
            return backend
        if backend is not None and self._is_server_gone(backend):
            self._finish(job, "is gone with its server")
        elif not job.warned:
            job.warned = True
            text = (
                "pool %r: lease %s stays counted: the server cannot tell whether backend %s is gone"
            )
            pool, token, pid = (
                job.fence.pool,
                job.fence.token,
                backend.pid if backend else "(unknown)",
            )
            fields = {"pool": pool, "lease": str(token), "reason": job.fence.why}
            logger.warning(text, pool, token, pid, extra={"sharedpool": fields})
        return None

    def _finish(self, job: _Job, how: str) -> None:
        fence = job.fence
        del self._jobs[fence.token]
        pid = fence.backend.pid if fence.backend else 0
        fields = {
            "pool": fence.pool,
            "lease": str(fence.token),
            "epoch": fence.token.epoch,
            "reason": fence.why,
        }
        text = "pool %r: lease %s: backend %d %s (%s)"
        # Behind a proxy every ordinary close ends here.
        level = logging.DEBUG if fence.backend and not fence.backend.direct else logging.INFO
        logger.log(
            level, text, fence.pool, fence.token, pid, how, fence.why, extra={"sharedpool": fields}
        )
        self._done(fence.token)


def _is_lent_again(job: _Job, backend: Backend, sight: ListedBackend) -> bool:
    """Return True if a listed backend belongs to its pooler again, and not to the lease.

    1. Our client has not left: only another name, while the backend is idle, shows it.
    2. Our client has left, and the backend is idle: another name, or a query since, shows it.
    3. Our client has left, and a query is running: it began since, under another name or so late
       that it cannot be the pooler's own query, which cleans the session.
    """
    if backend.pooled is None or not sight.start_us:
        return False
    if job.since_us is None:
        job.since_us = sight.now_us
    if not job.fence.left:
        return sight.idle and sight.name != backend.pooled
    if sight.idle:
        return sight.query_us > job.since_us or sight.name != backend.pooled
    others = sight.name != backend.pooled or sight.now_us - job.since_us > _CLEANED_S * 1_000_000
    return sight.query_us > job.since_us and others

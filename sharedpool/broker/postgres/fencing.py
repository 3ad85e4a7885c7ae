"""Backends that are to be gone: look for them, end them, and say when their slots are free.

A slot is freed only when `pg_stat_activity` of the very server the backend ran on does not list (pid, backend_start)
any more. Where nobody is between a worker and the server the broker sees most of that on its sockets, and this comes
later; behind a proxy this is all there is, so it is looked at once, and again and again, until it is settled. What its
worker has closed is given a moment to leave by itself before it is told to.

A *pooler* that keeps sessions (PgBouncer in session mode) does not end the backend when its client leaves: it cleans it
and lends it to others, who must not lose it by our hand. Such a backend is not ours any more once it has begun a query
after our client's end, or rests under another application_name. Only what is still under our session's, and has begun
no query since, is ended.
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
from sharedpool.wire.messages import Backend, Token

logger = logging.getLogger("sharedpool.broker")

# A slot is to be back soon after its backend has ended, however long that takes.
_FIRST_RETRY_S, _LAST_RETRY_S = 0.005, 0.05
_TOGETHER_S = 0.005  # what is due so soon is looked for in the same query
# How long a backend that was told by its client to leave may take, or a pooler to clean it. One that rests may be a
# worker's who has just been lent it, and has not told yet.
_LEAVES_S, _CLEANED_S, _RESTS_S = 0.02, 0.1, 1.0
_EVER_US = 2**62
# A backend leaves the list before it leaves the server: then it gives its place back, notes in the log that it is gone
# and exits. No query shows that; a process that has no more to do than this has done it by then. On a busy server it
# has to wait for a processor, as the query did that has shown it gone: so many times what that took, if that is longer.
_EXITS_S, _EXITS_QUERIES, _EXITS_LIMIT_S = 0.02, 8, 0.5


@dataclass(slots=True)
class _Job:
    fence: Fence
    due: float
    ends_at: float
    retry_s: float = _FIRST_RETRY_S
    since_us: int | None = (
        None  # the server's clock at the first look: what begins later is another's, behind a pooler
    )
    unlisted: bool = False
    warned: bool = False


class Fencing:
    """One control connection's orders. `done(token)` is called when a slot is free.

    `restarted(backend)` says whether the server that the backend was on is known to be another by now.
    """

    def __init__(self, done: Callable[[Token], None], restarted: Callable[[Backend], bool]) -> None:
        self._done = done
        self._restarted = restarted
        self._jobs: dict[Token, _Job] = {}
        self._powerless = False

    def add(self, fence: Fence, due: float) -> None:
        """Take in an order; nothing is done before `due`."""
        patience_s = 0.0
        if fence.left and fence.backend is not None and not fence.backend.direct:
            patience_s = _LEAVES_S if fence.backend.pooled is None else _CLEANED_S
        self._jobs[fence.token] = _Job(fence, due, due + patience_s)

    def discard(self, token: Token) -> None:
        """Forget an order: other evidence has come."""
        self._jobs.pop(token, None)

    @property
    def due(self) -> float:
        """When there is something to do."""
        return min((job.due for job in self._jobs.values()), default=math.inf)

    def work(self, conn: connection, boot_us: int, now: float) -> None:
        """Do what is due, on the server that was started at `boot_us`. Raise psycopg2's errors."""
        due = [job for job in self._jobs.values() if job.due <= now + _TOGETHER_S]
        if not any(job.due <= now for job in due):
            return
        for job in [job for job in due if job.unlisted and job.due <= now]:
            self._finish(job, "gone")
        due = [job for job in due if not job.unlisted]
        looked = [
            (job, backend) for job in due if (backend := self._comparable(job, boot_us)) is not None
        ]
        took_s = 0.0
        if looked:
            self._end_ripe(
                conn, [(job, backend) for job, backend in looked if job.ends_at <= now], now
            )
            began = time.monotonic()
            listed = statements.listed(conn, [backend.pid for _, backend in looked])
            took_s = time.monotonic() - began
            for job, backend in looked:
                sight = listed.get(backend.pid)
                # Start time 0: we may not see it, so it may be the same one.
                job.unlisted = sight is None or sight.start_us not in (backend.start_us, 0)
                if sight is not None and not job.unlisted and _is_lent_again(job, backend, sight):
                    self._finish(job, "is its pooler's again")
        exits_s = min(max(_EXITS_S, _EXITS_QUERIES * took_s), _EXITS_LIMIT_S)
        for job in due:
            job.due = now + (exits_s if job.unlisted else job.retry_s)
            job.retry_s = min(job.retry_s * 2, _LAST_RETRY_S)

    def _end_ripe(self, conn: connection, ripe: list[tuple[_Job, Backend]], now: float) -> None:
        """End backends that were given the time to leave by themselves."""
        self._end(conn, [backend for _, backend in ripe if backend.pooled is None])
        for job, backend in ripe:
            if backend.pooled is not None and not job.fence.left:
                self._end(conn, [backend], _EVER_US)  # whatever it does is its client's
            elif backend.pooled is not None and job.since_us is not None:
                self._end(conn, [backend], job.since_us, idle=now >= job.ends_at + _RESTS_S)

    def _end(
        self,
        conn: connection,
        backends: list[Backend],
        since_us: int | None = None,
        *,
        idle: bool = True,
    ) -> None:
        """Signal backends; if one of them makes that fail, each alone: it must not keep the others alive.

        Of those behind a pooler only one that has begun no query after `since_us`, and is under the session's own name;
        `idle`: if it rests, too.
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
                text = "control connection: may not end backends (%s): their slots wait until they end themselves"
                logger.warning(text, str(error).strip())

    def _comparable(self, job: _Job, boot_us: int) -> Backend | None:
        """Return the backend if this server can tell about it; settle the job if a restart already did."""
        backend = job.fence.backend
        if backend is not None and backend.start_us and backend.boot_us == boot_us:
            return backend
        if backend is not None and self._restarted(backend):
            self._finish(job, "server restarted")
        elif not job.warned:
            job.warned = True
            text = "pool %r: lease %s stays counted: the control connection cannot tell whether backend %s is gone"
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
        # Behind a proxy this is how every close ends.
        level = logging.DEBUG if fence.backend and not fence.backend.direct else logging.INFO
        logger.log(
            level, text, fence.pool, fence.token, pid, how, fence.why, extra={"sharedpool": fields}
        )
        self._done(fence.token)


def _is_lent_again(job: _Job, backend: Backend, sight: ListedBackend) -> bool:
    """Say whether a backend that is there still is its pooler's, not the lease's, any more."""
    if backend.pooled is None or not sight.start_us:
        return False
    if job.since_us is None:
        job.since_us = sight.now_us
    if not job.fence.left:  # a query is no sign of another client
        return sight.idle and sight.name != backend.pooled
    if sight.idle:
        return sight.query_us > job.since_us or sight.name != backend.pooled
    # Else, soon after our client has left and under its name still, it may be the pooler's own query, which cleans it.
    others = sight.name != backend.pooled or sight.now_us - job.since_us > _CLEANED_S * 1_000_000
    return sight.query_us > job.since_us and others

"""Who holds what: the broker's core, without I/O and without a clock.

Scope: count slots to `max_conn`, queue requests first come first served, remember what every session says of its
leases, and free a slot only on evidence that its backend is gone. It receives messages and the time, and returns
commands (`commands.py`) for the server to carry out. `records.py` keeps the books, `demand.py` serves the queue.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable
from typing import Any

from sharedpool.broker.commands import Command, Forget, Log, Send, Watch
from sharedpool.broker.demand import ANSWER_LIMIT_S, Demand
from sharedpool.broker.records import Books, Lease, Pool, Session, SlotState, Waiter
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Acquire,
    Bye,
    Cancel,
    Confirm,
    DenyReason,
    Hello,
    LeaseReport,
    Phase,
    PoolReport,
    Reject,
    Release,
    ReleaseReason,
    Renew,
    SessionReport,
    ToBroker,
    Token,
    Welcome,
)


class Ledger:
    """One broker's leases.

    `max_conn` caps the sum over all pools (None: only each pool's own limit); `ttl_s` is how long a session may be
    silent before its leases are suspect; `max_checkout_s` is reported on when a pool asks for nothing else (0: off);
    `expiration_s` is the longest idle time any pool may ask for.
    """

    def __init__(
        self,
        epoch: int,
        *,
        max_conn: int | None = None,
        ttl_s: float = 15.0,
        max_checkout_s: float = 0.0,
        expiration_s: float = math.inf,
    ) -> None:
        self.epoch = epoch
        self._ttl_s = ttl_s
        self._max_checkout_s = max_checkout_s
        self._expiration_s = expiration_s
        self._books = Books(max_conn)
        self._out: list[Command] = []
        self._timers: list[tuple[float, int, str, Any]] = []
        self._timer_serial = 0
        self._waiter_serial = 0
        self._demand = Demand(self._books, epoch, self._out.append, self._arm)
        self._handlers: dict[type, Callable[[Session, Any, float], None]] = {
            Acquire: self._acquire,
            Cancel: self._cancel,
            Confirm: self._confirm,
            Renew: self._renew,
            Release: self._release,
            Bye: self._bye,
        }
        self._alarms: dict[str, Callable[[Any, float], None]] = {
            "waiter": self._waiter_due,
            "session": self._session_due,
            "expiry": self._expiry_due,
            "checkout": self._checkout_due,
            "answer": self._answer_due,
            "closing": self._closing_due,
        }

    # --- what the server calls

    def handle(self, session_id: bytes, message: ToBroker, now: float) -> list[Command]:
        """Take in one message; return what is to be done."""
        if isinstance(message, Hello):
            self._hello(session_id, message, now)
        elif (session := self._books.sessions.get(session_id)) is None:
            if not isinstance(message, Bye):
                self._out.append(Send(session_id, Reject("this broker does not know the session")))
        elif not session.ended:  # what a dead worker sent last is void: its leases are being fenced
            self._hear(session, now)
            self._handlers[type(message)](session, message, now)
        return self._settled(now)

    def tick(self, now: float) -> list[Command]:
        """Do what is due by the clock."""
        while self._timers and self._timers[0][0] <= now:
            _, _, kind, subject = heapq.heappop(self._timers)
            self._alarms[kind](subject, now)
        return self._settled(now)

    def next_deadline(self) -> float | None:
        """Return when `tick` next has something to do."""
        return self._timers[0][0] if self._timers else None

    def session_died(self, session_id: bytes, now: float) -> list[Command]:
        """Take in that a session's process has ended (evidence, not a guess)."""
        session = self._books.sessions.get(session_id)
        if session is not None:
            self._end(session, "its worker died")
        return self._settled(now)

    def fenced(self, token: Token, now: float) -> list[Command]:
        """Take in that a fenced lease's backend is gone: its slot is free."""
        lease = self._books.leases.get(token)
        if lease is not None and lease.state is SlotState.FENCING:
            self._free(lease, "backend confirmed gone")
        return self._settled(now)

    @property
    def sessions(self) -> int:
        """How many sessions are registered."""
        return sum(not (s.suspect or s.ended) for s in self._books.sessions.values())

    @property
    def leases(self) -> int:
        """How many slots are not free."""
        return len(self._books.leases)

    def check_invariants(self) -> None:
        """Raise `AssertionError` when something that must hold does not."""
        self._books.check_invariants()
        self._demand.check_invariants()
        claimed = sum(token.epoch != self.epoch for token in self._books.leases)
        for pool in self._books.pools.values():
            assert len(pool.leases) <= pool.max_conn + claimed
        if self._books.max_conn is not None:
            assert len(self._books.leases) <= self._books.max_conn + claimed

    # --- messages

    def _hello(self, session_id: bytes, hello: Hello, now: float) -> None:
        if hello.version != PROTOCOL_VERSION:
            text = (
                f"the broker speaks protocol {PROTOCOL_VERSION}, this worker {hello.version}:"
                " install the same sharedpool version for both"
            )
            self._out.append(Send(session_id, Reject(text, fatal=True)))
            return
        books = self._books
        pool = books.pools.get(hello.pool.name)
        if pool is None:
            cap = books.max_conn
            pool = Pool(hello.pool, hello.pool.max_conn if cap is None else min(cap, hello.pool.max_conn))
            books.pools[pool.name] = pool
        elif hello.pool.server != pool.spec.server and session_id not in books.sessions:
            text = "pool %r: process %d connects to %s, the pool's first process to %s; give one of them another name="
            self._log(logging.WARNING, text, pool.name, hello.pid, hello.pool.server, pool.spec.server)
        session = books.sessions.get(session_id)
        if session is None:
            expiration_s = min(self._expiration_s, hello.pool.expiration_ms / 1000)
            session = Session(session_id, hello.pid, hello.host, hello.title, pool, expiration_s, now)
            books.sessions[session_id] = pool.sessions[session_id] = session
            self._out.append(Watch(session_id))
            self._arm(now + self._ttl_s, "session", session)
        # A worker that starts over has forgotten what it was asked for.
        self._demand.ignore(session)
        self._books.mark_owed(session, 0)
        self._hear(session, now)
        revoked = self._reconcile(session, hello.leases, now, seen=hello.seen, claim=True)
        expiration_ms, ttl_ms = int(session.expiration_s * 1000), int(self._ttl_s * 1000)
        welcome = Welcome(PROTOCOL_VERSION, self.epoch, pool.max_conn, expiration_ms, ttl_ms, revoked)
        self._out.append(Send(session_id, welcome))

    def _acquire(self, session: Session, acquire: Acquire, now: float) -> None:
        if acquire.request in session.waiters:
            return
        if acquire.request in session.granted:
            self._demand.send_grant(session.granted[acquire.request])  # the first one was lost
            return
        self._waiter_serial += 1
        nowait = acquire.wait_ms <= 0
        waiter = Waiter(session, acquire.request, self._waiter_serial, now, nowait)
        self._demand.add(waiter)
        if not nowait:
            self._arm(now + acquire.wait_ms / 1000, "waiter", waiter)

    def _cancel(self, session: Session, cancel: Cancel, now: float) -> None:
        waiter = session.waiters.get(cancel.request)
        if waiter is not None:
            self._books.dequeue(waiter)

    def _confirm(self, session: Session, confirm: Confirm, now: float) -> None:
        lease = session.leases.get(confirm.token)
        if lease is not None and lease.state is not SlotState.FENCING:
            lease.backend = confirm.backend
            if lease.state is not SlotState.OPEN:
                self._books.move(lease, SlotState.OPEN, "confirmed")
            self._note(lease, Phase.IN_USE, now, "", now)

    def _renew(self, session: Session, renew: Renew, now: float) -> None:
        self._demand.answered(session, renew.answers)
        pending = set(renew.pending)
        for waiter in [waiter for waiter in session.waiters.values() if waiter.request not in pending]:
            self._books.dequeue(waiter)  # its CANCEL was lost
        revoked = self._reconcile(session, renew.leases, now, seen=renew.seen)
        if not renew.answers or revoked:
            self._out.append(Send(session.id, Ack(revoked)))

    def _release(self, session: Session, release: Release, now: float) -> None:
        lease = session.leases.get(release.token)
        if lease is None or lease.state is SlotState.FENCING:
            return
        if release.reason is ReleaseReason.OWED and session.owed:
            self._books.mark_owed(session, session.owed - 1)
        if release.gone:
            self._free(lease, release.reason)
            return
        lease.backend = release.backend or lease.backend
        if lease.state is not SlotState.SUSPECT:
            self._books.move(lease, SlotState.SUSPECT, "close not confirmed")
        self._demand.fence(lease, "its worker could not see the backend end")

    def _bye(self, session: Session, bye: Bye, now: float) -> None:
        self._end(session, "its worker left without returning it")

    # --- sessions

    def _hear(self, session: Session, now: float) -> None:
        session.heard = now
        if session.mute or session.suspect:
            session.mute = session.suspect = False
            self._books.mark_owed(session, session.owed)

    def _end(self, session: Session, why: str) -> None:
        for waiter in list(session.waiters.values()):
            self._books.dequeue(waiter)
        self._demand.ignore(session)
        for lease in list(session.leases.values()):
            if lease.state is SlotState.GRANTED:
                self._free(lease, why)  # nothing was confirmed: there is no backend to look for
            elif lease.state is not SlotState.FENCING:
                if lease.state is not SlotState.SUSPECT:
                    self._books.move(lease, SlotState.SUSPECT, why)
                self._demand.fence(lease, why)
        session.ended = True
        self._books.mark_owed(session, 0)
        self._out.append(Forget(session.id))
        self._drop_if_over(session)

    def _drop_if_over(self, session: Session) -> None:
        """Forget a session that is over, and a pool nobody uses, once no lease is counted for it any more."""
        if session.leases or not (session.suspect or session.ended):
            return
        self._books.sessions.pop(session.id, None)
        session.pool.sessions.pop(session.id, None)
        if not session.pool.sessions:
            self._books.pools.pop(session.pool.name, None)

    def _free(self, lease: Lease, reason: str) -> None:
        self._books.move(lease, SlotState.FREE, reason)
        self._drop_if_over(lease.session)

    # --- leases as their workers report them

    def _reconcile(
        self, session: Session, reports: list[LeaseReport], now: float, *, seen: int = 0, claim: bool = False
    ) -> list[Token]:
        """Bring the books in line with a worker's word; return the tokens it has no right to."""
        revoked = []
        listed = set()
        for report in reports:
            listed.add(report.token)
            lease = session.leases.get(report.token)
            if lease is None and claim and report.token.epoch < self.epoch and report.token not in self._books.leases:
                lease = Lease(report.token, session, session.pool)  # held since before this broker started
                self._books.move(lease, SlotState.OPEN, "claimed")
            if lease is None or lease.state is SlotState.FENCING:
                revoked.append(report.token)
                continue
            self._update(lease, report, now)
        for lease in list(session.leases.values()):
            known = lease.token.epoch != self.epoch or lease.token.serial <= seen
            if known and lease.token not in listed and lease.state is not SlotState.FENCING:
                self._free(lease, "not held any more")  # its RELEASE was lost
        return revoked

    def _update(self, lease: Lease, report: LeaseReport, now: float) -> None:
        lease.backend = report.backend or lease.backend
        if report.phase is Phase.CONNECTING:
            state = SlotState.OPEN if lease.backend else SlotState.GRANTED
        else:
            state = SlotState.CLOSING if report.phase is Phase.CLOSING else SlotState.OPEN
        if lease.state is SlotState.GRANTED and state is SlotState.CLOSING:
            self._books.move(lease, SlotState.OPEN, "confirmed by report")
        if lease.state is not state:
            self._books.move(lease, state, "reported")
            if state is SlotState.CLOSING:
                self._arm(now + ANSWER_LIMIT_S, "closing", lease)
        if state is SlotState.OPEN:
            self._note(lease, report.phase, now - report.age_ms / 1000, report.thread, now)

    def _note(self, lease: Lease, phase: Phase, since: float, thread: str, now: float) -> None:
        self._books.mark_phase(lease, phase, since)
        lease.thread = thread
        if lease.session.taking:
            lease.pool.idle.pop(lease.token, None)  # spoken before it knew that it was asked: not asked for twice
        if phase is Phase.IDLE and not lease.expiry_armed:
            lease.expiry_armed = True
            self._arm(since + lease.session.expiration_s, "expiry", lease)
        if phase is Phase.IN_USE and self._max_checkout(lease.pool) and not lease.checkout_armed:
            lease.checkout_armed = True
            self._arm(since + self._max_checkout(lease.pool), "checkout", lease)

    def _max_checkout(self, pool: Pool) -> float:
        return pool.spec.max_checkout_ms / 1000 or self._max_checkout_s

    # --- timers

    def _arm(self, when: float, kind: str, subject: object) -> None:
        self._timer_serial += 1
        heapq.heappush(self._timers, (when, self._timer_serial, kind, subject))

    def _waiter_due(self, waiter: Waiter, now: float) -> None:
        if waiter.session.waiters.get(waiter.request) is waiter:
            waiter.session.pool.timeouts += 1
            self._demand.deny(waiter, DenyReason.TIMEOUT, now)

    def _session_due(self, session: Session, now: float) -> None:
        if self._books.sessions.get(session.id) is not session:
            return
        if session.heard + self._ttl_s > now:
            self._arm(session.heard + self._ttl_s, "session", session)
            return
        if not session.suspect and not session.ended:
            text = "pool %r: %s has been silent for %.1f s: its %d leases are suspect"
            self._log(logging.WARNING, text, session.pool.name, session.label, now - session.heard, len(session.leases))
            session.suspect = True
            self._demand.ignore(session)
            for lease in list(session.leases.values()):
                if lease.state not in (SlotState.SUSPECT, SlotState.FENCING):
                    self._books.move(lease, SlotState.SUSPECT, "TTL passed")
            for waiter in list(session.waiters.values()):
                self._books.dequeue(waiter)
        # Its waiters are gone; with its last lease it is forgotten (it says HELLO again when it comes back).
        self._drop_if_over(session)
        self._arm(now + self._ttl_s, "session", session)

    def _expiry_due(self, lease: Lease, now: float) -> None:
        lease.expiry_armed = False
        if lease.state is SlotState.OPEN and lease.idle_since is not None:
            due = lease.idle_since + lease.session.expiration_s
            lease.expiry_armed = True
            if due <= now and not lease.session.mute:
                self._demand.ask(lease.session, now, expired=True)
            self._arm(max(due, now + self._ttl_s / 3), "expiry", lease)

    def _checkout_due(self, lease: Lease, now: float) -> None:
        lease.checkout_armed = False
        limit = self._max_checkout(lease.pool)
        if lease.state is not SlotState.OPEN or lease.used_since is None or lease.reported:
            return
        if lease.used_since + limit > now:
            lease.checkout_armed = True
            self._arm(lease.used_since + limit, "checkout", lease)
            return
        lease.reported = True
        text = "pool %r: lease %s has been checked out for %.1f s (max_checkout %.1f s) by %s, thread %r, backend %s"
        pid = lease.backend.pid if lease.backend else "?"
        self._log(
            logging.WARNING, text, lease.pool.name, lease.token, now - lease.used_since, limit,
            lease.session.label, lease.thread, pid,
        )  # fmt: skip

    def _answer_due(self, session: Session, now: float) -> None:
        session.answer_armed = False
        if session.answered < session.asked and self._books.sessions.get(session.id) is session:
            session.mute = True
            self._demand.ignore(session)

    def _closing_due(self, lease: Lease, now: float) -> None:
        lease.pool.incoming.pop(lease.token, None)  # still counted, but no longer expected soon

    # --- output

    def _log(self, level: int, text: str, *args: object) -> None:
        self._out.append(Log(level, text % args))

    def _settled(self, now: float) -> list[Command]:
        self._demand.settle(now)
        out = self._out[:]
        self._out.clear()
        return out

    def report(self, now: float) -> tuple[list[PoolReport], list[SessionReport]]:
        """Return the state of every pool and session."""
        pools = []
        for pool in self._books.pools.values():
            states = [lease.state for lease in pool.leases.values()]
            idle = sum(lease.idle_since is not None for lease in pool.leases.values())
            count = states.count
            pools.append(
                PoolReport(
                    pool.name, pool.spec.server, pool.max_conn, len(pool.sessions), len(states),
                    count(SlotState.GRANTED), count(SlotState.OPEN) - idle, idle, count(SlotState.CLOSING),
                    count(SlotState.SUSPECT), count(SlotState.FENCING), len(pool.waiters),
                    pool.grants, pool.waits, pool.denials, pool.timeouts, pool.recalls, pool.fences,
                )
            )  # fmt: skip
        sessions = []
        for s in self._books.sessions.values():
            idle = sum(lease.idle_since is not None for lease in s.leases.values())
            sessions.append(
                SessionReport(
                    s.pid, s.host, s.title, s.pool.name, len(s.leases), len(s.leases) - idle, idle,
                    len(s.waiters), int((now - s.heard) * 1000), s.suspect,
                )
            )  # fmt: skip
        return pools, sessions

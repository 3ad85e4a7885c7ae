"""Who holds what: the broker's core, without I/O and without a clock.

Scope: count slots to `max_conn`, queue requests first come first served, remember what every session says of its
leases, and free a slot only on evidence that its backend is gone. It receives messages and the time, and returns
commands (`commands.py`) for the server to carry out. `records.py` keeps the books, `scheduler.py` serves the queue,
`handover.py` passes connections on, `sessions.py` knows the workers, `leases.py` follows what they report of their
leases, `moves.py` follows connections that move past the broker, `failover.py` what workers report of the server,
`recovery.py` takes over from a former broker.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from sharedpool.broker.core.admin import Admin
from sharedpool.broker.core.commands import (
    CancelBackend,
    Command,
    Entry,
    Member,
    Process,
    Send,
    SurveyResult,
    SurveyServer,
)
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.failover import Failover
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.leases import QUEUE_LIMIT_S, Leases
from sharedpool.broker.core.moves import Moves
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.broker.core.records import Lease, Pool, Session, SlotState, Waiter
from sharedpool.broker.core.recovery import GRACE_OVER, Recovery
from sharedpool.broker.core.report import lease_lines, report
from sharedpool.broker.core.routes import Routes, sessions_not_kept_text
from sharedpool.broker.core.scheduler import Scheduler
from sharedpool.broker.core.sessions import Sessions, Terms
from sharedpool.broker.core.shelves import Shelves
from sharedpool.broker.core.snapshot import Snapshot, take_snapshot
from sharedpool.wire.admin import Done, Order
from sharedpool.wire.board import Board
from sharedpool.wire.desk import Give, Moved
from sharedpool.wire.messages import (
    NO_TOKEN,
    Ack,
    Acquire,
    Bye,
    CancelQuery,
    Confirm,
    DenyReason,
    FailoverSign,
    Gone,
    Hello,
    Phase,
    Reject,
    Release,
    ReleaseReason,
    Renew,
    ReportNow,
    ToBroker,
    Token,
    Withdraw,
)
from sharedpool.wire.reports import LeaseLine, PoolReport, Report, SessionReport

# More threads than any process has: what asks for more is no worker.
_MOST_REQUESTS = 10_000
_MOST_ASKED = 500  # at once, for a command that wants to see


# What another thread has the broker's loop do.
LedgerCall = Callable[["Ledger", float], list[Command]]


class Ledger:
    """One broker's leases.

    `max_conn` caps the sum over all pools (None: only each pool's own limit); `ttl_s` is how long a session may be
    silent before its leases are suspect; `max_checkout_s` is reported on when a pool asks for nothing else (0: off);
    `expiration_s` is the longest idle time any pool may ask for. `has_control_connection`: there is a control
    connection, so that the server can be asked. `journal_complete`: all that former brokers granted is given to
    `restore`. `random` returns numbers from 0 to 1. `instance`, `desk` and `handover` are told to the workers
    (`Welcome`). `by_database`: pools of one name in two databases are two pools. `groups`, with `max_conn` only, and
    `limits` (of pools, by name) go before what the pools' users ask for. `server`: see `Routes`.
    """

    def __init__(
        self,
        epoch: int,
        *,
        max_conn: int | None = None,
        ttl_s: float = 15.0,
        max_checkout_s: float = 0.0,
        expiration_s: float = math.inf,
        has_control_connection: bool = True,
        journal_complete: bool = False,
        random: Callable[[], float] = lambda: 0.5,
        instance: str = "",
        desk: str = "",
        handover: bool = False,
        by_database: bool = False,
        groups: dict[str, GroupTerms] | None = None,
        limits: dict[str, int] | None = None,
        server: str = "",
    ) -> None:
        self.epoch = epoch
        self._has_control_connection = has_control_connection
        self._ttl_s = ttl_s
        context = Context(epoch, max_conn, has_control_connection=has_control_connection)
        self._context, self._slots, self._timers = context, context.slots, context.timers
        self._emit, self._log = context.emit, context.log
        self._waiter_serial = 0
        routes = Routes(server, has_control_connection=has_control_connection)
        self._scheduler = Scheduler(context, routes)
        terms = Terms(epoch, ttl_s, expiration_s, instance, desk, handover, by_database)
        self._sessions = Sessions(
            terms,
            context,
            self._scheduler,
            random,
        )
        self._leases = self._sessions.leases = Leases(
            context,
            self._scheduler,
            self._sessions.drop_if_over,
            max_checkout_s=max_checkout_s,
            ttl_s=ttl_s,
            journal_complete=journal_complete,
            routes=routes,
        )
        shelves = Shelves(context, expiration_s)
        self._handover = Handover(context, self._scheduler, self._leases, shelves)
        self._scheduler.handover = self._leases.handover = self._handover
        self._moves = Moves(
            context, self._scheduler, self._leases, shelves, remembers=journal_complete
        )
        self._sessions.moves, self._leases.transit = self._moves, self._moves.transit
        self._failover = Failover(context)
        self._admin = Admin(context, self._scheduler, self._leases, self._failover.begin_generation)
        self._admin.configure(max_conn, groups or {}, limits or {})
        self._recovery = Recovery(
            context,
            self._scheduler,
            self._sessions.pool,
            self._sessions.named,
        )
        self._survey_pending = False
        self._programs: dict[
            int, bytes
        ] = {}  # by the line that ends with them; see `line_identified`
        self.awaited: set[bytes] = set()
        self._handlers: dict[type, Callable[[Session, Any, float], None]] = {
            Acquire: self._request,
            Withdraw: self._cancel,
            Confirm: self._confirm,
            Renew: self._renew,
            Release: self._release,
            CancelQuery: lambda session, interrupt, _: self._handover.cancel_query(
                session, interrupt
            ),
            FailoverSign: lambda session, trouble, _: self._failover.failover_sign(
                session, trouble
            ),
            Bye: self._sessions.deregister,
        }

    # --- what the server calls

    def handle(
        self, session_id: bytes, message: ToBroker, now: float, process: Process | None = None
    ) -> list[Command]:
        """Take in one message, which the kernel says is from `process`; return what is to be done."""
        self._moves.sync(now)
        if isinstance(message, Hello):
            if (first := self._sessions.register(session_id, message, now, process)) is not None:
                self._acquire(self._slots.sessions[session_id], first, now)
            self._failover.compare()
        elif (session := self._slots.sessions.get(session_id)) is None:
            if not isinstance(message, Bye):
                self._emit(Send(session_id, Reject("this broker does not know the session")))
        elif session.restored and not isinstance(message, Release | Bye):
            self._emit(Send(session_id, Reject("this broker is a new one")))
        elif not session.ended or isinstance(
            message, Release
        ):  # a dead worker's last word counts only as evidence
            if (
                not session.restored
            ):  # that one is heard when it says HELLO: only then its silence is watched
                self._sessions.heard_from(session, now)
            self._handlers[type(message)](session, message, now)
        return self._scheduled(now)

    def tick(self, now: float) -> list[Command]:
        """Do what is due by the clock."""
        if (deadline := self._timers.next_deadline()) is None or deadline > now:
            return []  # every change was settled when it came
        self._moves.sync(now)
        while (alarm := self._timers.pop(now)) is not None:
            alarm.run(now)
        return self._scheduled(now)

    def next_deadline(self) -> float | None:
        """Return when `tick` next has something to do."""
        return self._timers.next_deadline()

    def session_died(self, session_id: bytes, now: float) -> list[Command]:
        """Take in that a session's process has ended (evidence, not a guess)."""
        self._moves.sync(now)
        session = self._slots.sessions.get(session_id)
        if session is not None:
            self._sessions.end(session, "its worker died", now)
        else:
            self._moves.former_gone(session_id)
        return self._scheduled(now)

    def backend_gone(self, token: Token, now: float) -> list[Command]:
        """Take in that a lease's backend was seen to be gone, whoever ended it: its slot is free."""
        self._moves.sync(now)
        lease = self._slots.leases.get(token)
        if lease is not None:
            session = lease.session
            if not session.ended:
                session.vanished.add(token)
                # A worker that is closing it knows.
                if lease.state in (SlotState.OPEN, SlotState.GRANTED):
                    self._emit(Send(session.id, Gone([token])))
            self._leases.free(lease, "its backend is gone")
        return self._scheduled(now)

    def backend_lost(self, token: Token, now: float, *, closed: bool = False) -> list[Command]:
        """Take in that a lease's connection is over on this side: its backend may live on, and is to be fenced.

        `closed`: the other side has closed it, which may be a proxy.
        """
        self._moves.sync(now)
        lease = self._slots.leases.get(token)
        if lease is not None:
            if not lease.session.ended and lease.state in (SlotState.OPEN, SlotState.GRANTED):
                self._emit(
                    Send(lease.session.id, Gone([token]))
                )  # for the worker it comes to the same
            self._leases.lost(lease, now, closed=closed)
        return self._scheduled(now)

    def believes(self, token: Token) -> bool:
        """Say whether the end of a lease's connection is its backend's end: nobody is in between."""
        lease = self._slots.leases.get(token)
        return lease is None or self._leases.routes.believes(lease)

    def reached(self, now: float, *, direct: bool, fault: str) -> list[Command]:
        """Take in how the control connection reaches the server, and what makes that way unsuitable, if anything."""
        self._leases.routes.reached(direct=direct, fault=fault)
        for pool in self._slots.pools.values():
            self._refuse_unsuitable(pool, now)
            if self._leases.routes.is_direct(pool):
                self._leases.hurry(
                    pool
                )  # the dead of a former broker are found before this is known
        return self._scheduled(now)

    def limited(self, now: float, *, role: str, limit: int | None) -> list[Command]:
        """Take in as whom the control connection has logged in, and how many connections that role may have."""
        self._failover.limited(role, limit)
        return self._scheduled(now)

    def _refuse_unsuitable(self, pool: Pool, now: float) -> None:
        """Refuse all who wait, where the server turns out not to do what a pool needs."""
        if self._leases.routes.unsuitable(pool):
            for waiter in list(pool.waiters.values()):
                self._refuse(waiter, now)

    def _refuse(self, waiter: Waiter, now: float) -> None:
        pool = waiter.session.pool
        pool.denials += 1
        self._scheduler.deny(
            waiter, DenyReason.UNSUITABLE, now, self._leases.routes.unsuitable(pool)
        )

    def expects(self, session_id: bytes, token: Token) -> bool:
        """Say whether a session may deposit a socket for this lease."""
        session = self._slots.sessions.get(session_id)
        return session is not None and token in session.leases

    def deposited(self, token: Token, now: float) -> list[Command]:
        """Take in that the broker has the socket of a lease's connection."""
        self._leases.deposited(self._slots.leases[token], now)
        return self._scheduled(now)

    def given(self, give: Give, now: float) -> list[Command]:
        """Take in a connection that is to be passed on."""
        self._moves.sync(now)
        session = self._slots.sessions.get(give.session)
        if session is not None and not (session.ended or session.restored):
            self._sessions.heard_from(session, now)
            if self._handover.given(session, give, now):
                return self._decided()
        return self._scheduled(now)

    def lane_opened(self, pool_name: str, serial: int, board: Board, now: float) -> list[Command]:
        """Take in that a pool's lane is there, by the order of this number."""
        self._moves.opened(pool_name, serial, board, now)
        return self._scheduled(now)

    def joined(self, session_id: bytes, now: float, *, takes_part: bool = True) -> list[Command]:
        """Take in that a session uses its pool's lane, or will not."""
        if (session := self._slots.sessions.get(session_id)) is not None:
            self._moves.joined(session, takes_part=takes_part)
        return self._scheduled(now)

    def found_on_shelf(self, pool_name: str, moved: Moved, now: float) -> list[Command]:
        """Take in what was found on a lane's shelf when connections move by the broker."""
        self._moves.sync(now)
        pool = self._slots.pools.get(pool_name)
        if pool is not None and (lease := self._moves.found_on_shelf(pool, moved)) is not None:
            self._handover.found_on_shelf(lease, moved.live, now)
        return self._scheduled(now)

    def shelf_empty(self, pool_name: str, now: float) -> list[Command]:
        """Take in that nothing was left on a lane's shelf."""
        self._moves.sync(now)
        if (pool := self._slots.pools.get(pool_name)) is not None:
            self._moves.shelf_empty(pool, now)
        return self._scheduled(now)

    def received(self, pool_name: str, moved: Moved, now: float) -> list[Command]:
        """Take in what the broker was given in a lane, for one who waits at the broker."""
        if (pool := self._slots.pools.get(pool_name)) is not None:
            self._moves.received(pool)
        return self.found_on_shelf(pool_name, moved, now)

    def not_delivered(self, moved: Moved, now: float) -> list[Command]:
        """Take in that a connection could not be sent to who was to have it."""
        self._moves.sync(now)
        self._handover.not_delivered(moved, now)
        return self._scheduled(now)

    def lane_full(self, pool_name: str, moved: Moved, now: float) -> list[Command]:
        """Take in that there is no room in the lane for what was to be given there."""
        self._moves.sync(now)
        pool = self._slots.pools.get(pool_name)
        if pool is not None and (lease := self._moves.found_on_shelf(pool, moved)) is not None:
            self._handover.park(lease, moved.live, now)
        return self._scheduled(now)

    def line_leaving(self, line: int) -> None:
        """Take in that this line is to end, and its program goes on."""
        self._programs.pop(line, None)

    def line_identified(self, program: bytes, line: int) -> None:
        """Take in that this line ends with a program, unless it is left before; its sessions' ids begin like that."""
        self._programs[line] = program

    def line_closed(self, line: int, now: float) -> list[Command]:
        """Take in that a line to the desk has ended: with its program perhaps, though its process may run another."""
        self._moves.sync(now)
        program = self._programs.pop(line, None)
        if program is not None:
            for session in [
                x for x in self._slots.sessions.values() if x.id.startswith(program) and not x.ended
            ]:
                self._sessions.end(session, "its worker ended", now)
        return self._scheduled(now)

    def query_cancelled(self, order: CancelBackend, sent: bool | None, now: float) -> list[Command]:
        """Take in that a cancel was sent, must not be, or (None) was not needed, or not possible just now."""
        self._moves.sync(now)
        if (pool := self._handover.query_cancelled(order, sent, now)) is not None:
            text = (
                "pool %r: no hand-over: the broker's role is no member of the workers'"
                " and may not cancel their queries"
            )
            self._log(logging.WARNING, text, pool.name, pool=pool.name)
        return self._scheduled(now)

    def surveyed(self, survey: SurveyResult, now: float) -> list[Command]:
        """Take in what the server lists."""
        strangers = self._slots.strangers(survey.tagged)
        if survey.serial == GRACE_OVER:
            if self._recovery.complete(survey, now):
                self._recovery.adopt(survey, strangers)
            else:
                self._timers.arm(now + SETTLE_S, self._grace_due, None)
            return self._scheduled(now)
        for token in self._leases.quarantine.surveyed(survey, strangers, now):
            self._leases.free(self._slots.leases[token], "no backend of its connect is left")
        if self._leases.quarantine.due(now):
            self._survey_pending = True  # a little later
            self._timers.arm(now + SETTLE_S, self._survey_due, None)
        return self._scheduled(now)

    def server_verified(self, pool: str, generation: int, same: bool, now: float) -> list[Command]:
        """Take in whether the server behind a pool is still the one it was."""
        self._failover.server_verified(pool, generation, same)
        return self._scheduled(now)

    def restore(
        self, entries: Iterable[Entry], now: float, members: Iterable[Member] = ()
    ) -> list[Command]:
        """Take over the leases of a former broker, and the members of its lanes, before anything else."""
        self._recovery.restore(entries, now, now + self._ttl_s)
        self._moves.restore(members)
        for lease in self._slots.leases.values():
            self._leases.mistrust(lease)
        self._timers.arm(now + self._ttl_s, _may_fence, None)
        return self._scheduled(now)

    @property
    def grace_s(self) -> float:
        """How long all workers take to notice that their broker is gone, and to tell another what they hold.

        After 2.5 heartbeats, three to a TTL, and a second (`worker/link/link.py`): with a TTL below 6 s that is later
        than one TTL.
        """
        return max(self._ttl_s, self._ttl_s * 2.5 / 3 + 1.25)

    def begin_grace_period(
        self, grace_s: float, now: float, why: str = "no journal of a former broker"
    ) -> list[Command]:
        """Grant nothing for `grace_s`: former brokers may have granted what nobody here knows."""
        self._scheduler.holding_back = True
        self._scheduler.held_back_because = (
            f"{why}, so it waits until all workers have said what they hold"
        )
        self._recovery.begin_grace_period(now, now + grace_s)
        self._timers.arm(now + grace_s, self._grace_due, None)
        self._log(logging.WARNING, "%s: granting nothing for %.1f s", why, grace_s)
        return self._scheduled(now)

    def outranked(self, now: float, why: str) -> list[Command]:
        """Grant nothing until `leads`: another broker counts to the same limit, or there is no telling yet (`why`)."""
        self._recovery.give_way()
        self._scheduler.held_back_because = why
        return self._scheduled(now)

    def leads(self, now: float, *, after_another: bool) -> list[Command]:
        """Begin to grant; `after_another`: when its workers have had the time to say what they hold."""
        self._recovery.lead()
        if after_another:
            self._leases.believe()
            return self.begin_grace_period(self.grace_s, now, "the journal is another broker's")
        return self._scheduled(now)

    def order(self, order: Order, now: float) -> tuple[Done, list[Command]]:
        """Carry an operator's order out; return what he is to be told, and what is to be done."""
        self._moves.sync(now)
        done = self._admin.carry_out(order, now)
        for line in done.said:
            self._log(logging.INFO, "by order: %s", line)
        return done, self._scheduled(now)

    def configure(
        self,
        max_conn: int | None,
        groups: dict[str, GroupTerms],
        limits: dict[str, int],
        now: float,
    ) -> list[Command]:
        """Take in other terms, that were checked; see `Ledger`."""
        self._admin.configure(max_conn, groups, limits)
        return self._scheduled(now)

    def request_reports(self) -> list[Command]:
        """Have the workers that hold something say what it is doing now; `awaited` are those that have not yet."""
        asked = [
            session
            for session in self._slots.sessions.values()
            if session.leases and not session.silent
        ]
        if len(asked) <= _MOST_ASKED:  # else what their heartbeats have told must do
            self.awaited |= {session.id for session in asked}
            for session in asked:
                self._emit(Send(session.id, ReportNow()))
        return self._decided()

    def drain(self, now: float) -> list[Command]:
        """Grant nothing any more, and have everything brought back. Who waits goes on waiting: a successor may come."""
        self._moves.sync(now)
        self._scheduler.draining = True
        for waiter in [
            waiter for pool in self._slots.pools.values() for waiter in pool.nowaits.values()
        ]:
            waiter.session.pool.denials += 1
            self._scheduler.deny(waiter, DenyReason.DRAINING, now)
        return self._scheduled(now)

    def process_was_suspended(self, now: float) -> None:
        """Take in that this process itself did not run for a while: nobody's silence in that time counts."""
        for session in self._slots.sessions.values():
            if not session.suspect:
                session.heard_at = now

    @property
    def sessions(self) -> int:
        """How many sessions are registered."""
        return sum(not (s.suspect or s.ended or s.shelf) for s in self._slots.sessions.values())

    @property
    def state(self) -> str:
        """What the broker is doing, in a word: serving, waiting (for the grace period's end) or draining."""
        return (
            "draining"
            if self._scheduler.draining
            else "waiting"
            if self._scheduler.holding_back
            else "serving"
        )

    @property
    def max_conn(self) -> int | None:
        """The limit over all pools, if there is one."""
        return self._slots.max_conn

    @property
    def leases(self) -> int:
        """How many slots are not free."""
        return len(self._slots.leases)

    def check_invariants(self) -> None:
        """Raise `AssertionError` when something that must hold does not."""
        self._slots.check_invariants()
        self._scheduler.check_invariants()
        self._handover.check_invariants()
        claimed = sum(
            token.epoch != self.epoch or not lease.session.pid
            for token, lease in self._slots.leases.items()
        )
        for pool in self._slots.pools.values():
            assert len(pool.leases) <= pool.max_conn + claimed or pool.name in self._slots.shrinking
        if self._slots.max_conn is not None and not self._slots.shrinking:
            assert len(self._slots.leases) <= self._slots.max_conn + claimed
            self._slots.groups.check_invariants(self._slots.room + claimed)

    # --- messages

    def _request(self, session: Session, acquire: Acquire, now: float) -> None:
        known = acquire.request in session.granted
        if (
            not known
            and self._scheduler.grants_at_once(session)
            and not self._leases.routes.unsuitable(session.pool)
        ):
            self._scheduler.grant(session, acquire.request, now, now)
        else:
            self._acquire(session, acquire, now)

    def _acquire(self, session: Session, acquire: Acquire, now: float) -> None:
        if (waiter := session.waiters.get(acquire.request)) is not None:
            waiter.lane_place = acquire.lane_place
            return
        if acquire.request in session.granted:
            self._scheduler.send_grant(session.granted[acquire.request])  # the first one was lost
            return
        self._waiter_serial += 1
        nowait = acquire.wait_ms <= 0
        waiter = Waiter(
            session,
            acquire.request,
            self._waiter_serial,
            now,
            nowait,
            lane_place=acquire.lane_place,
        )
        pool = session.pool
        crowded = (
            0 < pool.spec.max_waiting <= len(pool.waiters) or len(session.waiters) >= _MOST_REQUESTS
        )
        self._scheduler.add(waiter)
        refusal = (
            DenyReason.CROWDED
            if crowded
            else self._scheduler.reason_for_no_grants(pool)
            if nowait
            else None
        )
        if refusal is not None:
            pool.denials += 1
            self._scheduler.deny(waiter, refusal, now)
        elif self._leases.routes.unsuitable(pool):
            self._refuse(waiter, now)
        elif not nowait:
            self._timers.arm(now + acquire.wait_ms / 1000, self._waiter_due, waiter)

    def _cancel(self, session: Session, cancel: Withdraw, now: float) -> None:
        waiter = session.waiters.get(cancel.request)
        if waiter is not None:
            self._slots.dequeue(waiter)

    def _confirm(self, session: Session, confirm: Confirm, now: float) -> None:
        lease = session.leases.get(confirm.token)
        if lease is not None and lease.state is not SlotState.FENCING:
            self._leases.identify(lease, confirm.backend, now)
            if lease.state is not SlotState.OPEN:
                self._slots.move(lease, SlotState.OPEN, "confirmed")
            self._failover.opened(lease, confirm, now)
            self._leases.note(lease, Phase.IN_USE, now, "")
        elif lease is not None and lease.backend is None:  # its end was seen first
            self._leases.found(lease, confirm.backend, now)

    def _renew(self, session: Session, renew: Renew, now: float) -> None:
        self._slots.note_timings(session, renew.times)
        self.awaited.discard(session.id)
        session.recall_confirmed = max(session.recall_confirmed, renew.answers)
        self._scheduler.recall_answered(session, renew.answers)
        pending = set(renew.pending)
        if session.waiters:
            for waiter in [w for w in session.waiters.values() if w.request not in pending]:
                self._slots.dequeue(waiter)  # its WITHDRAW was lost
        for token in renew.gone:  # their RELEASE may have been lost
            if (lease := session.leases.get(token)) is not None:
                self._leases.free(lease, "given back")
        for release in renew.unproven:  # the same
            self._release(session, release, now)
        revoked = self._leases.reconcile(
            session,
            renew.leases,
            now,
            newest_grant=renew.newest_grant,
            known_recall=renew.answers,
            unsure=renew.unsure,
        )
        self._moves.answered(session, renew.answers, now, unsure=renew.unsure)
        if (twin := self._leases.routes.answered(session, renew.answers)) is not None:
            self._find_unsuitable(twin, now)
        if not renew.answers or revoked:
            pool = session.pool
            known = [*renew.gone, *(release.token for release in renew.unproven)]
            self._emit(Send(session.id, Ack(revoked, known, pool.generation, pool.limit)))
        if renew.answers:
            return
        seen = renew.newest_grant if renew.newest_grant.epoch == self.epoch else NO_TOKEN
        for lease in session.granted.values():
            if lease.token > seen and lease.token.epoch == self.epoch:
                self._scheduler.send_grant(lease)  # the first one was lost, or is on its way
        if not pending:
            return
        passed = {
            x.request
            for x in session.leases.values()
            if x.unconfirmed and x.state is SlotState.OPEN
        }  # on its way
        if not pending <= session.waiters.keys() | session.granted.keys() | passed:
            # It waits for what nobody will answer: an ACQUIRE or DENY was lost, or it was silent for too long.
            self._emit(
                Send(session.id, Reject("this broker does not know all requests: ask again"))
            )

    def _proves_end(self, release: Release, lease: Lease) -> bool:
        return release.gone or (release.closed and self._leases.routes.believes_refusal(lease))

    def _find_unsuitable(self, lease: Lease, now: float) -> None:
        """Use a pool no longer: a lease's backend is another one's at the same time. What is held is replaced."""
        pool, pid = lease.pool, lease.backend.pid if lease.backend else 0
        pool.unsuitable = sessions_not_kept_text(
            f"two connections that are open at the same time have the same backend, {pid}"
        )
        self._log(
            logging.ERROR,
            "pool %r: %s",
            pool.name,
            pool.unsuitable,
            pool=pool.name,
            reason="sessions not kept",
        )
        self._failover.begin_generation(pool, "its server is unsuitable")
        self._refuse_unsuitable(pool, now)

    def _release(self, session: Session, release: Release, now: float) -> None:
        lease = session.leases.get(release.token) or self._moves.closed_in_transit(session, release)
        if release.token in session.vanished:
            session.vanished.discard(release.token)  # the broker was the first to see its end
        elif lease is None or (
            lease.state is SlotState.FENCING and not self._proves_end(release, lease)
        ):
            return
        if release.reason is ReleaseReason.RETURN_DUE:
            session.pool.recalls += 1
        if release.reason is ReleaseReason.RETURN_DUE and session.returns_due:
            self._slots.mark_returns_due(session, session.returns_due - 1)
        if release.error:
            self._failover.failed(session, release, now)
        if lease is None:
            return
        if self._proves_end(release, lease):
            self._leases.free(lease, release.reason)
            return
        self._leases.identify(lease, release.backend, now)
        lease.closed = True
        ordinary = (
            lease.backend is not None and not lease.backend.direct
        )  # with every close behind a proxy
        level = logging.DEBUG if ordinary else logging.INFO
        why = "its worker could not see the backend end"
        self._leases.fence(lease, why, now, level=level, closed=release.closed)

    # --- timers

    def _waiter_due(self, waiter: Waiter, now: float) -> None:
        waiter.session.pool.timeouts += 1
        self._scheduler.time_out(waiter, now)

    def _survey_due(self, _: object, now: float) -> None:
        self._survey_pending = False

    def _grace_due(self, _: object, now: float) -> None:
        if now < self._recovery.grace_until:
            return  # it has begun anew
        if not self._leases.routes.control_is_direct and now < (
            least := self._recovery.grace_since + QUEUE_LIMIT_S
        ):
            self._timers.arm(
                least, self._grace_due, None
            )  # a connect may be in a proxy's queue until then
            return
        if self._has_control_connection:
            self._recovery.order_survey(now)
        else:
            self._recovery.serve()

    # --- output

    def _scheduled(self, now: float) -> list[Command]:
        if self._leases.routes.unproven:
            self._leases.prove(now)
        self._scheduler.schedule(now)
        if self._moves.update_modes(now):
            self._scheduler.schedule(
                now
            )  # who waits here, waited there as well until now: the holders are to be pressed
        if self._slots.contended or self._slots.shrinking:
            self._handover.watch_keepers(now)
        if not self._survey_pending and (order := self._leases.quarantine.order(now)) is not None:
            self._emit(SurveyServer(*order))
        return self._decided()

    def _decided(self) -> list[Command]:
        return self._context.take_commands()

    def report(self, now: float) -> tuple[list[PoolReport], list[SessionReport]]:
        """Return the state of every pool and session."""
        self._moves.sync(now)
        return report(self._slots, now)

    def oldest_leases(self, most: int, now: float) -> list[LeaseLine]:
        """Return the leases that have been doing what they do for longest."""
        return lease_lines(self._slots, most, now)

    def sample(self) -> None:
        """Note how many slots are in use: see `PoolReport.history`."""
        for pool in self._slots.pools.values():
            pool.history.append(sum(lease.idle_since is None for lease in pool.leases.values()))

    def snapshot(self, report: Report, now: float) -> Snapshot:
        """Return `report` with all that the metrics and the status page want besides."""
        return take_snapshot(self._slots, report, now)


def _may_fence(_: None, now: float) -> None:
    """Do nothing: the alarm has the scheduler look again, as restored leases may be fenced now."""

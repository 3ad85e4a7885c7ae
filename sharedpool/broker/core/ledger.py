"""The broker's core: who holds which lease, decided without I/O and without a clock.

The ledger counts slots to `max_conn`, serves requests first come first served, and frees a slot
only on evidence that its backend is gone. It receives messages, events and the time, and returns
commands (`commands.py`) for the server to carry out.

Its parts: `slots.py` keeps the records (`records.py`). `scheduler.py` serves the queue.
`sessions.py` knows the workers, `leases.py` their leases. `handover.py` passes connections on;
`moves.py` decides when they move past the broker. `takeover.py` takes over from a former broker.
`sharing.py` shares limits with other hosts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from sharedpool.broker.core.admin import Admin
from sharedpool.broker.core.commands import Command, Process, Send
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.control_events import ControlEvents
from sharedpool.broker.core.denials import Denials
from sharedpool.broker.core.desk_events import DeskEvents
from sharedpool.broker.core.failover import Failover
from sharedpool.broker.core.fences import Fences
from sharedpool.broker.core.fresh_reports import FreshReports
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.invariants import check_limits, check_records
from sharedpool.broker.core.lane_events import LaneEvents
from sharedpool.broker.core.lease_messages import LeaseMessages
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.moves import Moves
from sharedpool.broker.core.pool_directory import PoolDirectory
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.reconciler import Reconciler
from sharedpool.broker.core.records import Session
from sharedpool.broker.core.recovery import Recovery
from sharedpool.broker.core.report import lease_lines, report
from sharedpool.broker.core.requests import Requests
from sharedpool.broker.core.routes import Routes
from sharedpool.broker.core.scheduler import Scheduler
from sharedpool.broker.core.sessions import Sessions, Terms
from sharedpool.broker.core.sharing import Sharing
from sharedpool.broker.core.shelves import Shelves
from sharedpool.broker.core.snapshot import Snapshot, take_snapshot
from sharedpool.broker.core.takeover import Takeover
from sharedpool.wire.admin import Done, Order
from sharedpool.wire.messages import (
    Acquire,
    Bye,
    CancelQuery,
    Confirm,
    DenyReason,
    FailoverSign,
    Hello,
    Reject,
    Release,
    Renew,
    ToBroker,
    Withdraw,
)
from sharedpool.wire.reports import LeaseLine, PoolReport, Report, SessionReport
from sharedpool.wire.values import Token

# A call of the ledger that another thread asks the broker's loop to make.
LedgerCall = Callable[["Ledger", float], list[Command]]


class Ledger:
    """One broker's leases.

    Events of the desk go to `desk`, those of the lanes to `lanes`, and findings of the control
    connection to `control`. A change of brokers goes to `takeover`, all else to the methods here.
    Each returns the commands to carry out, in order.
    """

    def __init__(
        self,
        epoch: int,
        *,
        # How long a session may be silent before its leases are suspect.
        ttl_s: float,
        # The cap on the sum over all pools; None: only each pool's own limit.
        max_conn: int | None = None,
        # The longest checkout, for pools that set none themselves; 0: no limit.
        max_checkout_s: float = 0.0,
        # The longest idle time that a pool may ask for.
        expiration_s: float = math.inf,
        has_control_connection: bool = True,  # to ask the server which backends it has
        # All that former brokers granted will be given to `restore`.
        journal_complete: bool = False,
        random: Callable[[], float] = lambda: 0.5,  # numbers from 0 to 1
        # Told to the workers (`Welcome`).
        instance: str = "",
        desk: str = "",
        handover: bool = False,
        # Pools of one name in two databases are two pools.
        by_database: bool = False,
        # What groups of pools are promised; only with `max_conn`.
        groups: dict[str, GroupTerms] | None = None,
        # Limits of pools by name, instead of those that their users ask for.
        limits: dict[str, int] | None = None,
        server: str = "",  # see `Routes`
        # The limits are shared with other hosts: that over all pools, or else each pool's own. The
        # text names the former among the database's shared limits.
        shared: bool = False,
        scope: str = "",
    ) -> None:
        self.epoch = epoch
        context = Context(epoch, max_conn, has_control_connection=has_control_connection)
        self._context, self._slots, self._timers = context, context.slots, context.timers
        self._emit, self._log = context.emit, context.log
        self.fresh_reports = FreshReports(context)
        # From here on, each part needs only parts that are made before it.
        self._routes = Routes(server, has_control_connection=has_control_connection)
        self._recalls = Recalls(context)
        fences = Fences(context)
        self._leases = Leases(
            context,
            self._recalls,
            fences,
            self._routes,
            lambda session: self._sessions.drop_if_over(session),
            max_checkout_s=max_checkout_s,
            ttl_s=ttl_s,
            journal_complete=journal_complete,
        )
        shelves = Shelves(context, expiration_s)
        self._moves = Moves(
            context, self._recalls, self._leases, shelves, journal_complete=journal_complete
        )
        transit = self._moves.transit
        reconciler = Reconciler(context, fences, self._leases, transit, ttl_s=ttl_s)
        self.sharing = Sharing(
            context,
            self._recalls,
            self._settle,
            lambda name, paused, now: self._admin.set_paused(name, paused, now),
            lambda: self.takeover.claim(),
            lambda: self.takeover.resign(),
            by_pool=shared and max_conn is None,
            cap=scope if shared and max_conn is not None else "",
            instance=instance,
        )
        directory = PoolDirectory(context, instance, random, self.sharing, by_database=by_database)
        self._sessions = Sessions(
            context,
            Terms(epoch, ttl_s, expiration_s, instance, desk, handover),
            directory,
            self._recalls,
            self._leases,
            reconciler,
            self._moves,
            self.sharing,
        )
        self._handover = Handover(context, self._recalls, self._leases, shelves)
        self._denials = Denials(context, self._routes, self.sharing.reports)
        self._scheduler = Scheduler(
            context, self._routes, self._recalls, fences, self._handover, self._denials
        )
        self._requests = Requests(context, self._routes, self._scheduler, self._denials)
        self._failover = Failover(context)
        self._lease_messages = LeaseMessages(
            context,
            self._scheduler,
            self._recalls,
            self._denials,
            self._leases,
            reconciler,
            self._moves,
            self._failover,
        )
        self._admin = Admin(
            context,
            self._recalls,
            self._leases,
            self._handover,
            self._denials,
            self._failover.begin_generation,
            self.sharing,
        )
        self._admin.configure(max_conn, groups or {}, limits or {})
        recovery = Recovery(context, directory.get, directory.find_tagged)
        common = self._handover, self._moves, self._settle
        self.desk = DeskEvents(context, self._sessions, self._leases, self._lease_messages, *common)
        self.lanes = LaneEvents(context, *common)
        self.takeover = Takeover(
            context, recovery, self._leases, self._moves, self._settle, ttl_s=ttl_s
        )
        self.control = ControlEvents(
            context,
            self._leases,
            self._handover,
            self._moves,
            self._failover,
            self._denials,
            self.takeover,
            self._settle,
        )

    # --- messages and the clock

    def handle(
        self, session_id: bytes, message: ToBroker, now: float, process: Process | None = None
    ) -> list[Command]:
        """Handle a worker's message; `process` is its sender's, as the kernel tells."""
        self._moves.transit.sync(now)
        self.sharing.trust.expire(now)
        session = self._slots.sessions.get(session_id)
        if isinstance(message, Hello):
            first = self._sessions.register(session_id, message, now, process)
            if first is not None:
                self._requests.enqueue(self._slots.sessions[session_id], first, now)
            self._failover.compare()
        elif session is None:
            if not isinstance(message, Bye):
                self._emit(Send(session_id, Reject("this broker does not know the session")))
        elif session.restored and not isinstance(message, Release | Bye):
            self._emit(Send(session_id, Reject("this broker is a new one")))
        elif not session.ended or isinstance(message, Release):
            # A dead worker's RELEASE counts as evidence.
            if not session.restored:  # known from the journal: its silence counts from its HELLO on
                self._sessions.heard_from(session, now)
            self._dispatch(session, message, now)
        return self._settle(now)

    def _dispatch(self, session: Session, message: ToBroker, now: float) -> None:
        match message:
            case Acquire():
                self._requests.acquire(session, message, now)
            case Release():
                self._lease_messages.release(session, message, now)
            case Confirm():
                self._lease_messages.confirm(session, message, now)
            case Renew():
                self.fresh_reports.awaited.discard(session.id)
                self._lease_messages.renew(session, message, now)
            case Withdraw():
                self._requests.withdraw(session, message)
            case CancelQuery():
                self._handover.cancel_query(session, message, now)
            case FailoverSign():
                self._failover.failover_sign(session, message)
            case Bye():
                self._sessions.deregister(session, message, now)

    def tick(self, now: float) -> list[Command]:
        """Do what is due by the clock."""
        if (deadline := self._timers.next_deadline()) is None or deadline > now:
            return []
        self._moves.transit.sync(now)
        while (alarm := self._timers.pop(now)) is not None:
            alarm.run(now)
        return self._settle(now)

    def next_deadline(self) -> float | None:
        """Return when `tick` next has something to do."""
        return self._timers.next_deadline()

    def _settle(self, now: float) -> list[Command]:
        """Do all that has become possible or necessary by a change; return the commands."""
        if self._routes.unproven:
            self._leases.settle_unproven(now)
        self.sharing.trust.expire(now)
        self.sharing.returns.act(now)
        self._scheduler.schedule(now)
        self.sharing.update(now)
        if self._moves.update_modes(now):
            # The broker's waiters had waited in the lane as well, and no longer do: holders are to
            # be asked for their next checkins.
            self._scheduler.schedule(now)
        if self._slots.contended or self._slots.shrinking:
            self._handover.watch_keepers(now)
        self.control.order_survey(now)
        return self._context.take_commands()

    # --- evidence of ends

    def session_died(self, session_id: bytes, now: float) -> list[Command]:
        """Handle the confirmed end of a session's process."""
        self._moves.transit.sync(now)
        session = self._slots.sessions.get(session_id)
        if session is not None:
            self._sessions.end(session, "its worker died", now)
        else:
            self._moves.former_ended(session_id)
        return self._settle(now)

    def backend_gone(self, token: Token, now: float) -> list[Command]:
        """Handle that a lease's backend was seen to be gone, whoever ended it: free its slot."""
        self._moves.transit.sync(now)
        if (lease := self._slots.leases.get(token)) is not None:
            self._leases.vanished(lease)
        return self._settle(now)

    def ended_without_proof(
        self, token: Token, now: float, *, peer_closed: bool = False
    ) -> list[Command]:
        """Handle an end on this side: the backend may live on. See `Leases.ended_without_proof`."""
        self._moves.transit.sync(now)
        if (lease := self._slots.leases.get(token)) is not None:
            self._leases.announce_end(lease)  # to the worker, the connection is as good as gone
            self._leases.ended_without_proof(lease, now, peer_closed=peer_closed)
        return self._settle(now)

    def believes(self, token: Token) -> bool:
        """Return True if the end of a lease's connection proves its backend's end: no proxy."""
        lease = self._slots.leases.get(token)
        return lease is None or self._routes.believes(lease)

    def process_was_suspended(self, now: float) -> None:
        """Forget how long sessions have been silent: this process itself did not run."""
        for session in self._slots.sessions.values():
            if not session.suspect:
                session.heard_at = now

    # --- operators

    def order(self, order: Order, now: float) -> tuple[Done, list[Command]]:
        """Carry an operator's order out; return the answer, and the commands."""
        self._moves.transit.sync(now)
        done = self._admin.carry_out(order, now)
        for line in done.said:
            self._log(logging.INFO, "by order: %s", line)
        return done, self._settle(now)

    def configure(
        self,
        max_conn: int | None,
        groups: dict[str, GroupTerms],
        limits: dict[str, int],
        now: float,
    ) -> list[Command]:
        """Change the terms to these, which were checked; see `__init__`."""
        self._admin.configure(max_conn, groups, limits)
        return self._settle(now)

    def drain(self, now: float) -> list[Command]:
        """Grant nothing any more, and take everything back; patient waiters go on waiting."""
        self._moves.transit.sync(now)
        self._slots.grant_stop.draining = True
        for pool in self._slots.pools.values():
            for waiter in list(pool.nowaits.values()):
                self._denials.deny(waiter, DenyReason.DRAINING, now)
        return self._settle(now)

    # --- reports

    @property
    def sessions(self) -> int:
        """How many sessions are registered."""
        return sum(not (s.suspect or s.ended or s.shelf) for s in self._slots.sessions.values())

    @property
    def state(self) -> str:
        """What the broker is doing: serving, waiting (for the grace period's end) or draining."""
        stop = self._slots.grant_stop
        return "draining" if stop.draining else "waiting" if stop.holding_back else "serving"

    @property
    def max_conn(self) -> int | None:
        """The limit over all pools, if there is one."""
        return self._slots.max_conn

    @property
    def leases(self) -> int:
        """How many slots are not free."""
        return len(self._slots.leases)

    def report(self, now: float) -> tuple[list[PoolReport], list[SessionReport]]:
        """Return the state of every pool and session."""
        self._moves.transit.sync(now)
        return report(self._slots, now)

    def oldest_leases(self, most: int, now: float) -> list[LeaseLine]:
        """Return up to `most` leases, first those that have been in use for longest."""
        return lease_lines(self._slots, most, now)

    def sample(self) -> None:
        """Record how many slots are in use: see `PoolReport.history`."""
        for pool in self._slots.pools.values():
            pool.history.append(sum(lease.idle_since is None for lease in pool.leases.values()))

    def snapshot(self, report: Report, now: float) -> Snapshot:
        """Return `report`, and what the metrics and the status page show besides."""
        return take_snapshot(self._slots, report, now)

    def check_invariants(self) -> None:
        """Raise `AssertionError` if something that must hold does not."""
        slots = self._slots
        check_records(slots)
        self._recalls.check_invariants()
        self._scheduler.check_invariants()
        self._handover.check_invariants()
        check_limits(slots, self.epoch)

"""Sessions: a worker says HELLO, falls silent, leaves or dies."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs

from sharedpool.broker.core.backoff import Backoff
from sharedpool.broker.core.commands import Forget, Process, Send, Watch
from sharedpool.broker.core.connect_refusals import Refusals
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.demand import has_room
from sharedpool.broker.core.leases import LONGEST_MS, Leases
from sharedpool.broker.core.moves import Moves
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.reconciler import Reconciler
from sharedpool.broker.core.records import Pool, Session, SlotState
from sharedpool.broker.core.timers import Alarm
from sharedpool.wire.application_name import shown, tag_of
from sharedpool.wire.messages import (
    NO_TOKEN,
    PROTOCOL_VERSION,
    Acquire,
    Bye,
    Hello,
    PoolSpec,
    Reject,
    Token,
    Welcome,
)

_MOST_STRANGERS = 10  # servers of which the log tells that a pool's processes connect to them too
_SHOWN = 255  # characters of what a worker calls itself and its host: they are in every report


def version_mismatch_text(version: int) -> str:
    """Return what a worker of another protocol version is told."""
    return (
        f"the broker speaks protocol {PROTOCOL_VERSION}, this worker {version}:"
        " install the same sharedpool version for both, and restart what is older"
    )


@dataclass(frozen=True, slots=True)
class Terms:
    """What every session is told, or held to. Times in seconds; see `Ledger`."""

    epoch: int
    ttl_s: float
    expiration_s: float = math.inf
    instance: str = ""
    desk: str = ""
    handover: bool = False
    by_database: bool = False


class Sessions:
    """The sessions' side of the ledger; `leases` and `moves` are set once they are made."""

    def __init__(
        self,
        context: Context,
        terms: Terms,
        recalls: Recalls,
        leases: Leases,
        reconciler: Reconciler,
        moves: Moves,
        random: Callable[[], float],
    ) -> None:
        self._terms = terms
        self._slots = context.slots
        self._recalls = recalls
        self._leases = leases
        self._reconciler = reconciler
        self._moves = moves
        self._emit = context.emit
        self._arm = context.timers.arm
        self._log = context.log
        self._random = random
        # Those that have not fallen silent, the longest unheard first: one alarm, for that one, will do for all.
        self._not_silent: OrderedDict[bytes, Session] = OrderedDict()
        self._alarm: Alarm | None = None

    def pool(self, spec: PoolSpec) -> Pool:
        """Return the pool of that name, made when there is none."""
        slots = self._slots
        if not self._terms.by_database:
            spec = structs.replace(spec, database="")
        pool = slots.find(spec) or self._unnamed(spec)
        if pool is None:
            pool = Pool(spec, spec.max_conn, Backoff(self._random), refusals=Refusals(self._random))
            slots.add(pool)
            if (past := slots.former_pools.pop(pool.name, None)) is not None:
                pool.inherit_counters(past)
        elif not pool.unnamed:
            return pool
        else:
            slots.name(pool, spec)
        pool.max_conn = slots.limit(pool.name, spec)
        slots.assign(pool)
        if slots.paused_pools:
            slots.shrink(pool)
        return pool

    def _unnamed(self, spec: PoolSpec) -> Pool | None:
        """Return the pool whose backends alone were known so far, by what their tags show of its name."""
        pool = self._slots.find(structs.replace(spec, name=shown(spec.name, self._terms.instance)))
        return pool if pool is not None and pool.unnamed else None

    def named(self, alias: str, database: str) -> Pool | None:
        """Return the pool of that name, or of which tags show that name."""
        if not self._terms.by_database:
            database = ""
        for pool in self._slots.pools.values():
            spec = pool.spec
            if spec.database == database and alias in (
                spec.name,
                shown(spec.name, self._terms.instance),
            ):
                return pool
        return None

    def register(
        self, session_id: bytes, hello: Hello, now: float, process: Process | None
    ) -> Acquire | None:
        """Register a session, or register it again; return the request that came along if it is to be answered."""
        if hello.version != PROTOCOL_VERSION:
            self._emit(Send(session_id, Reject(version_mismatch_text(hello.version), fatal=True)))
            return None
        slots = self._slots
        pool = self.pool(hello.pool)
        strange = hello.pool.server != pool.spec.server and hello.pool.server not in pool.strangers
        if strange and len(pool.strangers) < _MOST_STRANGERS:
            pool.strangers.add(hello.pool.server)
            text = "pool %r: process %d connects to %s, the pool's first process to %s; give one of them another name="
            self._log(
                logging.WARNING, text, pool.name, hello.pid, hello.pool.server, pool.spec.server,
                pool=pool.name, session=f"{hello.title}[{hello.pid}]", reason="another server",
            )  # fmt: skip
        session = slots.sessions.get(session_id)
        if session is not None and session.ended:
            return None  # late: its process is gone
        if session is None:
            expiration_s = min(
                self._terms.expiration_s, min(hello.pool.expiration_ms, LONGEST_MS) / 1000
            )
            host, title = hello.host[:_SHOWN], hello.title[:_SHOWN]
            session = Session(session_id, hello.pid, host, title, pool, expiration_s, now, process)
            slots.sessions[session_id] = pool.sessions[session_id] = session
            self._emit(Watch(session_id, process))
        elif session.restored:
            session.restored = False
            session.spared_until = -math.inf
            session.process = process  # as it is known here, not to the former broker
            self._emit(Watch(session_id, process))
        # A worker that starts over has forgotten what it was asked for.
        self._recalls.expect_no_answer(session)
        self._slots.mark_returns_due(session, 0)
        self.heard_from(session, now)
        revoked = self._reconciler.reconcile(
            session, hello.leases, now, newest_grant=hello.newest_grant, claim=True
        )
        expiration_ms, ttl_ms = int(session.expiration_s * 1000), int(self._terms.ttl_s * 1000)
        # One that connects elsewhere, or as somebody else, must neither be given the others' connections nor give its.
        handover = (
            self._terms.handover
            and hello.pool.server == pool.spec.server
            and pool.cancel_works is not False
        )
        first = hello.first
        # Who has to wait asks when he is in the lane, where a connection can be passed to him.
        if first is not None and first.request not in session.granted and not has_room(slots, pool):
            first = None
        welcome = Welcome(
            PROTOCOL_VERSION, self._terms.epoch, pool.limit, expiration_ms, ttl_ms, revoked,
            tag_of(pool.spec.name, self._terms.instance), self._terms.desk, pool.generation, handover, hello.nonce,
            0 if first is None else first.request,
        )  # fmt: skip
        self._emit(Send(session_id, welcome))
        session.hands_over = handover
        self._moves.session_registered(session, now)
        return first

    def heard_from(self, session: Session, now: float) -> None:
        session.heard_at = now
        if session.unresponsive or session.suspect:
            self._slots.mark_heard(session)
        if session.ended:
            return
        self._not_silent[session.id] = session
        self._not_silent.move_to_end(session.id)
        if self._alarm is None:
            self._arm_silence_alarm(now + self._terms.ttl_s)

    def _arm_silence_alarm(self, until: float) -> None:
        self._alarm = self._arm(until, self.silence_due, None)

    def _stop_watching_silence(self, session: Session) -> None:
        """Do not watch for a session's silence any more."""
        self._not_silent.pop(session.id, None)
        if not self._not_silent and self._alarm is not None:
            self._alarm.cancelled = True
            self._alarm = None

    def end(
        self, session: Session, why: str, now: float, *, unused_above: Token | None = None
    ) -> None:
        """End a session; leases above `unused_above`, if given, were never taken up by its worker."""
        known_recall, session.ended = (
            session.ended,
            True,
        )  # its line and its process are both seen to end: told of once
        self._stop_watching_silence(session)
        held = [
            lease for lease in session.leases.values() if lease.live is None
        ]  # else given back, and parked here
        if held and not known_recall:
            text = "pool %r: %s: %s; its %d leases are ended"
            self._log(
                logging.INFO, text, session.pool.name, session.label, why, len(held),
                pool=session.pool.name, session=session.label, reason=why,
            )  # fmt: skip
        for waiter in list(session.waiters.values()):
            self._slots.dequeue(waiter)
        self._recalls.expect_no_answer(session)
        was_in_lane = (
            session.id in session.pool.former
        )  # a former broker's: what it held may have moved on there
        self._moves.session_ended(session)
        self._moves.check_unconfirmed(session.pool, now)
        for lease in list(session.leases.values()):
            if lease.state is SlotState.FENCING:
                continue
            current = lease.token.epoch == self._terms.epoch
            if (
                was_in_lane
                and not current
                and self._moves.transit.may_have_moved(lease, session, now + self._terms.ttl_s)
            ):
                continue
            unused = unused_above is not None and current and lease.token > unused_above
            if lease.findable or not unused:
                parked = lease.live is not None  # which is no fault of anybody's
                self._leases.fence(lease, why, now, level=logging.DEBUG if parked else logging.INFO)
            else:
                self._leases.free(lease, why)
        self._slots.mark_returns_due(session, 0)
        self.drop_if_over(session)

    def drop_if_over(self, session: Session) -> None:
        """Forget a session that is over, and a pool nobody uses, once no lease is counted for it any more."""
        pool = session.pool
        if session.leases or not (session.suspect or session.ended or session.shelf):
            return
        if not session.shelf:
            if self._slots.sessions.pop(session.id, None) is None:
                return
            self._emit(Forget(session.id))
            self._stop_watching_silence(session)
            self._moves.session_ended(session)
            del pool.sessions[session.id]
        if pool.sessions and (pool.shelf is None or len(pool.sessions) > 1 or pool.shelf.leases):
            return
        if pool.shelf is not None:
            del self._slots.sessions[pool.shelf.id]
            pool.sessions.clear()
            pool.shelf = None
        self._moves.pool_discarded(pool)
        self._slots.discard(pool)

    def deregister(self, session: Session, bye: Bye, now: float) -> None:
        self._slots.note_timings(session, bye.times)
        # Who says BYE holds nothing and takes nothing any more: a grant still on its way will not be used. But the
        # RELEASE that told of a connect without an end may have been lost, with a former broker perhaps.
        seen = bye.newest_grant if bye.newest_grant.epoch == self._terms.epoch else NO_TOKEN
        self.end(session, "its worker left without returning it", now, unused_above=seen)

    def silence_due(self, _: None, now: float) -> None:
        """Suspect those that have been silent for the TTL, and watch for the next one."""
        self._alarm = None
        while self._not_silent:
            session = next(iter(self._not_silent.values()))
            due = session.heard_at + self._terms.ttl_s
            if due > now:
                self._arm_silence_alarm(due)
                return
            self._stop_watching_silence(session)
            self._suspect(session, now)

    def _suspect(self, session: Session, now: float) -> None:
        text = "pool %r: %s has been silent for %.1f s: its %d leases are suspect"
        self._log(
            logging.WARNING, text, session.pool.name, session.label, now - session.heard_at, len(session.leases),
            pool=session.pool.name, session=session.label, reason="silent",
        )  # fmt: skip
        session.suspect = True
        self._recalls.expect_no_answer(session)
        for lease in list(session.leases.values()):
            if lease.state not in (SlotState.SUSPECT, SlotState.FENCING) and lease.live is None:
                self._slots.move(lease, SlotState.SUSPECT, "TTL passed")
                self._leases.watch_connect(lease)
        for waiter in list(session.waiters.values()):
            self._slots.dequeue(waiter)
        # Its waiters are gone; with its last lease it is forgotten (it says HELLO again when it comes back).
        self.drop_if_over(session)

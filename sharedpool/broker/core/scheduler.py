"""Match waiters with slots: grant, recall what lies idle, press the busy for a checkin, refuse who will not wait.

Decisions only, over the records; nothing here does I/O or reads a clock. `schedule` runs after every change:

1. Grant free slots to the oldest waiters, over all pools.
2. If slots are short: recall idle leases, longest idle first; then fence suspect ones; then *press* the holders, so
   that their next checkins come back instead of being cached.
3. A waiter that does not want to wait is refused once every holder has answered, after that waiter's arrival, that it
   has nothing idle. Such a question to all holders is a *round*; later arrivals share the next one. A suspect lease is
   fenced then, for the next caller.
4. While connections cannot be opened and the pool has none, every waiter is told the server's error at once. So is
   who would have to open one, but was refused by the server and may not try again yet (`connect_refusals.py`).
5. Where an operator has lowered a limit or paused a pool, what is too much is recalled in the same ways, for nobody.

While `holding_back` (a restarted broker that does not know yet what is held) requests only queue; while `draining` too,
and everybody is asked for everything: who waits is served by the successor, if one comes in time.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterable
from itertools import chain, islice, takewhile
from typing import Protocol

from sharedpool.broker.core.commands import Fence, Log, Send
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.records import GRANTED, Lease, Pool, Session, SlotState, Waiter
from sharedpool.broker.core.routes import Routes
from sharedpool.wire.messages import Ack, Deny, DenyReason, Grant, Holder, Recall

# A worker that has not answered a recall, or finished a close, for so long is not waited for any more.
ANSWER_LIMIT_S = 1.0
HOLDERS_NAMED = 3


class HandoverPort(Protocol):
    """The hand-over, as the queue sees it."""

    def serve(self, now: float) -> None:
        """Give what is parked to who waits."""

    def promised(self, pool: Pool, now: float) -> int:
        """Return how many parked connections the waiters will be given in a moment."""

    def on_shelf(self, pool: Pool) -> int:
        """Return how many connections lie in the lane, and will be given to the waiters in a moment."""

    def end_parked(self, pools: Iterable[Pool], most: int, now: float) -> int:
        """End up to `most` parked connections; return how many."""


class Scheduler:
    """The queue's side of the ledger. `arm(when, kind, subject)` asks for a timer. `handover` is set once it is
    made.
    """

    handover: HandoverPort

    def __init__(
        self,
        context: Context,
        routes: Routes,
    ) -> None:
        self._slots = context.slots
        self._epoch = context.epoch
        self._routes = routes
        self._emit = context.emit
        self._arm = context.timers.arm
        self._ask_serial = 0  # of recalls and of what they say to owe
        self._round = 0
        self._polling: dict[
            bytes, int
        ] = {}  # sessions asked in this round, and the recall they are to answer
        self._newcomers: list[Waiter] = []  # against whose sessions there is a refusal
        self._arrived = 0  # the newest recall when the last request came that does not wait
        self.holding_back = self.draining = False
        self.held_back_because = ""  # it is paused

    def next_recall_serial(self) -> int:
        """Return the number of the next word on what a session owes."""
        self._ask_serial += 1
        return self._ask_serial

    def schedule(self, now: float) -> None:
        """Do all that can be done for the waiters after a change."""
        slots = self._slots
        if self.draining:
            self._drain(now)
            return
        if self.holding_back:
            return
        if self._newcomers:
            self._refuse_newcomers(now)
        if slots.shrinking:
            self._shrink(now)
        if slots.contended and not self._nothing_to_schedule_at_all():
            self.handover.serve(now)
            self._serve(now)
            self._fail(now)
            if slots.contended and not self._nothing_to_schedule_at_all():
                self._ask_back(now)
        self._cancel_returns(now)

    def _ask_back(self, now: float) -> None:
        self._recall(now)
        if any(pool.nowaits for pool in self._slots.contended.values()):
            self._refuse(
                now
            )  # before the next round begins, or a stream of requests would put it off for ever
            self._poll(now)
            self._refuse(now)

    def _nothing_to_schedule_at_all(self) -> bool:
        return len(self._slots.pools) == 1 and self.nothing_to_schedule(
            next(iter(self._slots.pools.values()))
        )

    def nothing_to_schedule(self, pool: Pool) -> bool:
        """Say whether nothing can be done for this pool's waiters but wait for a checkin: as is usual where many share.

        What `schedule` would look at, without its loops.
        """
        return not (
            pool.parked
            or pool.idle
            or pool.suspects
            or (pool.not_asked_to_return and not pool.moving)
            or pool.nowaits
            or self._newcomers
            or self.draining
            or self.holding_back
            or pool.backoff.ceiling is not None
            or self._slots.shrinking
            or self._slots.groups
            or len(self._slots.pools) > 1
            or len(pool.leases) < pool.max_conn
        )

    # --- 1. grant

    def has_room(self, pool: Pool) -> bool:
        """Say whether a slot is free that nobody waits for, and no connection that could be passed on instead."""
        if self.holding_back or self.draining or self._slots.contended or pool.parked:
            return False
        return not pool.paused and pool.room > 0 and self._slots.available(pool) > 0

    def _serve(self, now: float) -> None:
        slots = self._slots
        while slots.room > 0:
            pools = [
                pool
                for pool in slots.contended.values()
                if pool.room > 0 and slots.available(pool) > 0
            ]
            if not pools:
                return
            waiter = min((next(iter(pool.waiters.values())) for pool in pools), key=slots.rank)
            if not self._refused_newcomer(waiter, now):
                self._grant(waiter, now)

    def _refuse_newcomers(self, now: float) -> None:
        """Refuse who would only make others give up a connection, and may not open one in its place."""
        newcomers, self._newcomers = self._newcomers, []
        for waiter in newcomers:
            # In the lane it may be given a connection that is open.
            if waiter.lane_place < 0 and waiter.session.waiters.get(waiter.request) is waiter:
                self._refused_newcomer(waiter, now)

    def _refused_newcomer(self, waiter: Waiter, now: float) -> bool:
        session, pool = waiter.session, waiter.session.pool
        if pool.refusals.blocked_until(session.id, session.refusal, now) is None:
            return False
        pool.denials += 1
        self.deny(waiter, DenyReason.REFUSED, now)
        return True

    def grants_at_once(self, session: Session) -> bool:
        """Say whether a request would not be in the queue for a moment: there is a slot, and nothing else to do.

        What `schedule` would look at.
        """
        return session.refusal is None and not self._slots.shrinking and self.has_room(session.pool)

    def _grant(self, waiter: Waiter, now: float) -> None:
        self._slots.dequeue(waiter)
        self.grant(waiter.session, waiter.request, waiter.since, now)

    def grant(self, session: Session, request: int, since: float, now: float) -> None:
        """Grant a request that came at `since`."""
        pool = session.pool
        lease = Lease(
            self._slots.new_token(), session, pool, request=request, granted_at=now, waited_s=now - since, since=now
        )  # fmt: skip
        self._slots.move(lease, GRANTED, "granted")
        if session.refusal is not None:
            pool.refusals.note_try(session.id, session.refusal, now)
        if pool.backoff.granted(lease.token, len(pool.leases) - 1, now):
            self._arm(pool.backoff.probe_at, _probe_due, pool)
        pool.grants += 1
        session.passes += 1
        pool.waits += now > since
        pool.waited.append(now - since)
        if (pressure := self.returns_wanted(pool, session)) or session.returns_due:
            self._slots.mark_returns_due(session, min(len(session.leases), pressure))
        self.send_grant(lease)

    def send_grant(self, lease: Lease) -> None:
        """Send a grant, or send it again for a request that was repeated."""
        serial, returns_due, waited_ms = (
            self.next_recall_serial(),
            lease.session.returns_due,
            int(lease.waited_s * 1000),
        )
        direct = self._routes.believes_refusal(lease)
        code = lease.pool.backoff.code
        self._emit(
            Send(
                lease.session.id,
                Grant(lease.request, lease.token, serial, returns_due, waited_ms, direct, code),
            )
        )

    # --- 2. recall

    def _recall(self, now: float) -> None:
        slots = self._slots
        for pool in list(slots.contended.values()):
            short = self._shortage(pool)
            if short > 0:
                if pool.parked:
                    short -= min(
                        short, self.handover.promised(pool, now)
                    ) or self.handover.end_parked([pool], short, now)
                if pool.idle:
                    short -= self._recall_idle([pool], short, now)
                if pool.suspects:
                    short -= self._fence_suspects([pool], min(short, self._patient(pool)), now)
                if short > 0 and pool.not_asked_to_return:
                    self._request_returns(pool, now)
        if slots.groups:
            self._recall_for_groups(now)
        elif slots.max_conn is not None and (short := self._shortage_of_cap()) > 0:
            # The cap over all pools is what keeps them waiting: any pool's slot will do.
            pools = sorted(slots.pools.values(), key=lambda pool: len(pool.waiters))
            short -= self._recall_unused(pools, short, sum(map(self._patient, pools)), now)
            if short > 0:
                for pool in pools:
                    self._request_returns(pool, now)

    def _recall_unused(self, pools: list[Pool], short: int, patient: int, now: float) -> int:
        """Have up to `short` slots of these pools come back that nobody uses; return how many.

        What is suspect is ended only for those who wait, `patient` in number.
        """
        most = short
        short -= self.handover.end_parked(pools, short, now)
        short -= self._recall_idle(pools, short, now)
        return most - short + self._fence_suspects(pools, min(short, patient), now)

    def _recall_for_groups(self, now: float) -> None:
        """The same for each pool that is kept waiting by others: by the cap, or by its group's limit.

        What lies idle is taken of whom it is least important, but not what is reserved for him; who is more important
        than who waits is not pressed for what he uses.
        """
        slots = self._slots
        by_rank = sorted(
            slots.contended.values(), key=lambda pool: slots.rank(next(iter(pool.waiters.values())))
        )
        coming = sum(pool.coming for pool in slots.pools.values())  # whoever it will be for
        for waiting in by_rank:
            givers = [pool for pool in slots.pools.values() if slots.serves(pool, waiting)]
            short = min(len(waiting.waiters), waiting.own_room) - coming
            for pool in sorted(givers, key=lambda pool: (pool.priority, len(pool.waiters))):
                spare = (
                    short if pool.group is None or pool.group is waiting.group else pool.group.spare
                )
                if short > 0 and spare > 0:
                    short -= self._recall_unused(
                        [pool], min(short, spare), self._patient(waiting), now
                    )
            if short > 0:
                for pool in givers:
                    if pool.priority <= waiting.priority:
                        self._request_returns(pool, now)
                    else:
                        self._ask_for_idle(pool, next(reversed(waiting.waiters)), now)
            coming = max(0, coming - len(waiting.waiters))

    @staticmethod
    def _shortage(pool: Pool) -> int:
        """How many waiters there are beyond the pool's free slots and those on their way."""
        return 0 if pool.paused else len(pool.waiters) - max(pool.room, 0) - pool.coming

    def _shortage_of_cap(self) -> int:
        """How many waiters have room in their pool but none under the cap, and no slot on its way."""
        slots = self._slots
        servable = sum(
            min(len(pool.waiters), max(pool.room, 0)) for pool in slots.contended.values()
        )
        if not servable:
            return 0  # what keeps them waiting is their own pool's limit
        return servable - slots.room - sum(pool.coming for pool in slots.pools.values())

    def _recall_idle(self, pools: Iterable[Pool], short: int, now: float) -> int:
        """Ask for up to `short` idle leases; return for how many."""
        chosen: dict[bytes, tuple[Session, int]] = {}
        idle = chain.from_iterable(pool.idle.values() for pool in pools)
        for lease in list(islice(idle, short)):
            del lease.pool.idle[lease.token]
            session, count = chosen.get(lease.session.id, (lease.session, 0))
            chosen[session.id] = (session, count + 1)
        for session, count in chosen.values():
            self._slots.mark_taking(session, session.taking + count)
            session.pool.recalls += count
            self.send_recall(session, now, take=count)
        return sum(count for _, count in chosen.values())

    def recall_all_idle(self, pool: Pool, now: float) -> None:
        """Ask for all that lies idle in a pool's processes."""
        self._recall_idle([pool], len(pool.idle), now)

    def _fence_suspects(self, pools: Iterable[Pool], short: int, now: float) -> int:
        """Fence up to `short` suspect leases; return how many.

        One that has no connection yet is left alone: there is nothing to look for, and its worker may yet connect
        (see `Leases.mistrust`).
        """
        suspects = chain.from_iterable(pool.suspects.values() for pool in pools)
        ripe = (lease for lease in suspects if lease.findable and now >= lease.session.spared_until)
        chosen = list(islice(ripe, max(short, 0)))
        for lease in chosen:
            self.fence_suspect(lease, "its worker is silent and somebody waits", now)
        return len(chosen)

    def fence_suspect(
        self, lease: Lease, why: str, now: float, *, level: int = logging.INFO
    ) -> None:
        """Have a suspect lease's backend ended and verified; its slot stays counted until then."""
        pool, token, whose, pid = (
            lease.pool.name,
            lease.token,
            lease.session.label,
            lease.backend and lease.backend.pid,
        )
        fields = {
            "pool": pool,
            "lease": str(token),
            "epoch": self._epoch,
            "session": whose,
            "reason": why,
        }
        text = f"pool {pool!r}: lease {token} of {whose}: backend {pid or '(unknown)'} is to end ({why})"
        self._emit(Log(level, text, fields))
        self._slots.move(lease, SlotState.FENCING, why)
        lease.pool.fences += 1
        lease.since = now
        self.expect(lease, now)
        self.order_fence(lease, why)

    def revoke(self, lease: Lease) -> None:
        """Tell a session that a lease is not its own any more."""
        pool = lease.pool
        self._emit(Send(lease.session.id, Ack([lease.token], [], pool.generation, pool.limit)))

    def order_fence(self, lease: Lease, why: str) -> None:
        """Order the end of a lease's backend."""
        self._emit(
            Fence(
                lease.token,
                lease.pool.name,
                lease.backend,
                why,
                lease.closed or lease.session.ended,
            )
        )

    def expect(self, lease: Lease, now: float) -> None:
        """Count on a slot that is being closed or fenced, for a while."""
        lease.pool.incoming[lease.token] = lease
        self._arm(now + ANSWER_LIMIT_S, self.closing_due, lease)

    def closing_due(self, lease: Lease, now: float) -> None:
        """Do not count any longer on a slot whose close or fence takes long."""
        lease.pool.incoming.pop(lease.token, None)  # still counted, but no longer expected soon

    @staticmethod
    def _patient(pool: Pool) -> int:
        return 0 if pool.paused else len(pool.waiters) - len(pool.nowaits)

    def _pools_served_by(self, pool: Pool) -> list[Pool]:
        """Return the pools whose waiters a slot of this one would serve: under an exhausted cap, others' too."""
        slots = self._slots
        if slots.groups:
            others = [
                other for other in slots.contended.values() if other.priority >= pool.priority
            ]
            return [pool, *(other for other in others if slots.serves(pool, other))]
        if slots.max_conn is None or slots.room > 0:
            return [pool]
        return [
            pool,
            *(other for other in slots.contended.values() if other is not pool and other.room > 0),
        ]

    def slots_wanted(self, pool: Pool) -> int:
        """How many patient waiters a slot of this pool would help; or how many slots an operator wants back."""
        return sum(map(self._patient, self._pools_served_by(pool))) + self.excess(pool)

    def _first_patient(self, pool: Pool) -> Waiter | None:
        """Return the patient waiter who would get a slot of this pool."""
        first: Waiter | None = None
        for other in self._pools_served_by(pool):
            if other.paused or len(other.waiters) == len(other.nowaits):
                continue
            waiters = other.waiters.values()
            head = (
                next(w for w in waiters if not w.nowait) if other.nowaits else next(iter(waiters))
            )
            if first is None or self._slots.rank(head) < self._slots.rank(first):
                first = head
        return first

    def returns_wanted(self, pool: Pool, holder: Session) -> int:
        """How many of `holder`'s next checkins others wait for: none while its own waiter is the first."""
        if not (self._slots.contended or self._slots.shrinking):
            return 0
        first = self._first_patient(pool)
        return (
            self.excess(pool)
            if first is not None and first.session is holder
            else self.slots_wanted(pool)
        )

    def _ask_for_idle(self, pool: Pool, newest: int, now: float) -> None:
        """Ask holders, once for each waiter that comes, what lies idle; later they tell of it with their heartbeats."""
        for session in [*pool.asked_to_return.values(), *pool.not_asked_to_return.values()]:
            if session.inquired < newest:
                session.inquired = newest
                self.send_recall(session, now)

    def _request_returns(self, pool: Pool, now: float) -> None:
        if pool.moving or not self.slots_wanted(pool):
            return  # where connections move past the broker, it waits in the lane for those who wait here
        for session in list(pool.not_asked_to_return.values()):
            returns_due = min(len(session.leases), self.returns_wanted(pool, session))
            if returns_due:
                self._slots.mark_returns_due(session, returns_due)
                self.send_recall(session, now)

    def _cancel_returns(self, now: float) -> None:
        """Tell holders that owe for nothing: nobody waits any more, or the first waiter is their own."""
        for pool in self._slots.pools.values():
            if not pool.asked_to_return or now < pool.shared_until:
                continue  # what is given back for nobody is parked then, and may be had again for a word
            if not self.slots_wanted(pool):
                relaxed = list(pool.asked_to_return.values())
            elif (
                first := self._first_patient(pool)
            ) is not None and first.session.id in pool.asked_to_return:
                relaxed = [first.session]
            else:
                continue
            for session in relaxed:
                returns_due = session.returns_due
                self._slots.mark_returns_due(session, min(returns_due, self.excess(pool)))
                if session.returns_due != returns_due:
                    self._emit(
                        Send(
                            session.id,
                            Recall(self.next_recall_serial(), 0, session.returns_due, answer=False),
                        )
                    )

    def excess(self, pool: Pool) -> int:
        """How many slots an operator wants back beyond those on their way: the pool is paused, or a limit was lowered.

        Not what a session is to bring back (`Session.draining`).
        """
        slots = self._slots
        if pool.name not in slots.shrinking:
            return 0
        too_many = max(len(pool.leases) - pool.target - pool.coming, 0)
        if pool.group is not None and pool.group.room < 0:
            too_many = max(
                too_many, -pool.group.room - sum(other.coming for other in pool.group.pools)
            )
        if (overdrawn := slots.overdrawn) and (pool.group is None or pool.group.beyond > 0):
            givers = [
                other
                for other in slots.pools.values()
                if other.group is None or other.group.beyond > 0
            ]
            too_many = max(too_many, overdrawn - sum(other.coming for other in givers))
        return too_many

    def _shrink(self, now: float) -> None:
        """Ask for what an operator wants back."""
        slots = self._slots
        for pool in list(slots.shrinking.values()):
            if (excess := self.excess(pool)) > 0:
                excess -= self.handover.end_parked([pool], excess, now)
                excess -= self._recall_idle([pool], excess, now)
                excess -= self._fence_suspects([pool], excess, now)
                for session in [*pool.asked_to_return.values(), *pool.not_asked_to_return.values()]:
                    if session.returns_due < (
                        returns_due := min(len(session.leases) - session.taking, excess)
                    ):
                        self._slots.mark_returns_due(session, returns_due)
                        self.send_recall(session, now)
            del slots.shrinking[pool.name]
            slots.shrink(pool)  # until it is done

    def _drain(self, now: float) -> None:
        """Ask for everything: what lies idle now, all else at its checkin."""
        for pool in self._slots.pools.values():
            self.handover.end_parked([pool], len(pool.parked), now)
            self._recall_idle([pool], len(pool.idle), now)
            for session in [*pool.asked_to_return.values(), *pool.not_asked_to_return.values()]:
                if session.returns_due < len(session.leases):
                    self._slots.mark_returns_due(session, len(session.leases))
                    self.send_recall(session, now)

    def send_recall(
        self, session: Session, now: float, *, take: int = 0, expired: bool = False
    ) -> None:
        """Ask a session for `take` idle leases and for what it holds; watch for its answer."""
        session.asked = self.next_recall_serial()
        self._emit(Send(session.id, Recall(session.asked, take, session.returns_due, expired)))
        self._watch_answer(session, now)

    def _watch_answer(self, session: Session, now: float) -> None:
        if not session.awaited:
            session.awaited = session.asked
            self._arm(now + ANSWER_LIMIT_S, self.answer_due, session)

    def recall_answered(self, session: Session, serial: int) -> None:
        """Note that a session has said what it holds, knowing recall `serial`."""
        session.answered = max(session.answered, min(serial, session.asked))
        if session.answered >= session.asked:
            session.expiring = False
            self._slots.mark_taking(session, 0)
        if session.answered >= self._polling.get(session.id, math.inf):
            del self._polling[session.id]

    def answer_due(self, session: Session, now: float) -> None:
        """Doubt a session that has not answered in time, until it speaks."""
        awaited, session.awaited = session.awaited, 0
        if session.answered < awaited:
            self.expect_no_answer(session)
            self._slots.mark_unresponsive(session)
        elif session.answered < session.asked:
            self._watch_answer(session, now)

    def expect_no_answer(self, session: Session) -> None:
        """Stop expecting answers from a session that gives none, starts over, or is gone."""
        session.expiring = False
        session.answered = session.asked
        session.draining.clear()
        self._slots.mark_taking(session, 0)
        self._polling.pop(session.id, None)
        self._slots.mark_returns_due(session, session.returns_due)

    # --- 3. refuse

    def add(self, waiter: Waiter) -> None:
        """Queue a request."""
        self._slots.enqueue(waiter)
        if waiter.session.refusal is not None:
            self._newcomers.append(waiter)
        if waiter.nowait:
            self._arrived = self._ask_serial

    def _poll(self, now: float) -> None:
        if self._polling:
            return
        fresh: list[Waiter] = []
        short_of_cap = self._shortage_of_cap() > 0 or bool(self._slots.groups)
        for pool in self._slots.contended.values():
            if (
                short_of_cap or self._shortage(pool) > 0
            ):  # else enough is on its way: nobody need be asked
                fresh += takewhile(
                    lambda waiter: waiter.round is None, reversed(pool.nowaits.values())
                )
        if not fresh:
            return
        self._round += 1
        for waiter in fresh:
            waiter.round = self._round
        # A session knows its own cache: when only it asks, it need not be asked.
        askers = {waiter.session.id for waiter in fresh}
        capped = self._slots.max_conn is not None and (
            self._slots.room <= 0 or bool(self._slots.groups)
        )
        pools = (
            list(self._slots.pools.values())
            if capped
            else [waiter.session.pool for waiter in fresh]
        )
        for pool in dict.fromkeys(pools):
            for session in [*pool.asked_to_return.values(), *pool.not_asked_to_return.values()]:
                if askers == {session.id}:
                    continue
                if session.asked <= self._arrived:
                    self.send_recall(session, now)
                if session.answered < session.asked:
                    self._polling[session.id] = session.asked

    def _refuse(self, now: float) -> None:
        if self._polling:
            return
        for pool in list(self._slots.contended.values()):
            if not pool.nowaits:
                continue
            kin = [pool] if pool.group is None else pool.group.pools
            promised = self.handover.promised(pool, now) + self.handover.on_shelf(pool)
            coming = max(pool.room, 0) + sum(each.coming for each in kin) + promised
            everywhere = (
                self._slots.available(pool)
                + sum(p.coming for p in self._slots.pools.values())
                + promised
            )
            unserved = islice(pool.waiters.values(), max(0, min(coming, everywhere)), None)
            refused = [waiter for waiter in unserved if waiter.nowait and waiter.round is not None]
            # They do not wait for the end of what is suspect, but the next caller is to find its slot free: with
            # nobody but such callers it would fill the pool for ever.
            capped = pool.own_room > 0  # any pool's slot would do
            self._fence_suspects(
                list(self._slots.pools.values()) if capped else [pool], len(refused), now
            )
            for waiter in refused:
                pool.denials += 1
                self.deny(waiter, DenyReason.EXHAUSTED, now)

    def _fail(self, now: float) -> None:
        for pool in list(self._slots.contended.values()):
            # A ceiling above 0 is a server that is full: a pool that had to make way for its probe is not without hope.
            # Nor is one that an operator has paused, perhaps for this very failover: he will resume it.
            if (
                pool.backoff.ceiling == 0
                and pool.own_room <= 0
                and not pool.has_connections
                and not pool.paused
            ):
                # They are told at once, but they did want a slot: what is suspect must not fill the pool for ever.
                self._fence_suspects([pool], len(pool.waiters), now)
                for waiter in list(pool.waiters.values()):
                    pool.denials += 1
                    self.deny(waiter, DenyReason.FAILING, now)

    def time_out(self, waiter: Waiter, now: float) -> None:
        """Refuse who has waited for as long as he wanted."""
        reason = DenyReason.WAITING if self.holding_back else DenyReason.TIMEOUT
        if (
            waiter.session.refusal is not None and not self.holding_back
        ):  # that is what it could not be served for
            reason = DenyReason.REFUSED
        self.deny(waiter, self.reason_for_no_grants(waiter.session.pool) or reason, now)

    def reason_for_no_grants(self, pool: Pool) -> DenyReason | None:
        """Say why nothing is lent, if that may last."""
        if self.draining:
            return DenyReason.DRAINING
        return DenyReason.PAUSED if pool.paused else None

    def deny(self, waiter: Waiter, reason: DenyReason, now: float, why: str = "") -> None:
        """Refuse a request, saying what its limit is and who holds most of it, or `why`, or what the server said."""
        slots, pool = self._slots, waiter.session.pool
        slots.dequeue(waiter)
        capped = (
            pool.own_room > 0 and slots.max_conn is not None
        )  # its own limit would allow one more
        leases = slots.leases if capped else pool.leases
        sessions = {
            lease.session.id: lease.session for lease in leases.values() if not lease.session.shelf
        }
        most = heapq.nlargest(
            HOLDERS_NAMED, sessions.values(), key=lambda session: len(session.leases)
        )
        holders = [
            _holder(session, f" in {session.pool.name!r}" if capped else "", now)
            for session in most
        ]
        limit = slots.max_conn if capped and slots.max_conn is not None else pool.max_conn
        group, reserved = "", 0
        if pool.group is not None:
            reserved = slots.groups.reserved - pool.group.terms.reserved if capped else 0
            if pool.group.room <= 0 and pool.group.terms.max_conn is not None:
                group, limit = pool.group.name, pool.group.terms.max_conn
        error, retry_at = (
            why or (self.held_back_because if self.holding_back else pool.backoff.error),
            pool.backoff.probe_at,
        )
        session = waiter.session
        if reason is DenyReason.REFUSED and session.refusal is not None:
            error = session.refusal.error
            retry_at = pool.refusals.blocked_until(session.id, session.refusal, now) or now
        retry_ms = max(0, int((retry_at - now) * 1000))
        denial = Deny(
            waiter.request, reason, limit, holders, capped, error, retry_ms, group, reserved
        )
        self._emit(Send(waiter.session.id, denial))

    def check_invariants(self) -> None:
        """Raise `AssertionError` when waiters are left without anything being done for them."""
        slots = self._slots
        for session_id, serial in self._polling.items():
            session = slots.sessions[session_id]
            assert not session.silent, session.label
            assert session.answered < serial <= session.asked, session.label
        if self.holding_back or self.draining:
            return
        for pool in slots.contended.values():
            assert not (pool.room > 0 and slots.available(pool) > 0), (
                f"{pool.name}: a free slot and a waiter"
            )
            if self._shortage(pool) > len(pool.parked):
                assert not pool.idle, f"{pool.name}: an idle lease nobody recalled"
                keep = [s for s in pool.not_asked_to_return.values() if len(s.leases) > s.taking]
                assert pool.moving or all(not self.returns_wanted(pool, s) for s in keep), pool.name
        if slots.contended and not slots.groups and self._shortage_of_cap() > 0:
            assert not any(pool.idle for pool in slots.pools.values()), (
                "an idle lease nobody recalled"
            )


def _holder(session: Session, where: str, now: float) -> Holder:
    """Return what the text of an error says of a session: how much it holds, and what is out for longest."""
    since, stack = min(
        ((x.used_since, x.stack) for x in session.leases.values() if x.used_since is not None),
        key=lambda used: used[0],
        default=(now, ()),
    )
    return Holder(
        session.label + where,
        len(session.leases),
        int((now - since) * 1000),
        stack[0] if stack else "",
    )


def _probe_due(pool: Pool, now: float) -> None:
    """Let one connect be tried."""
    pool.backoff.elapsed(now)

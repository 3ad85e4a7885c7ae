"""The real ledger and real caches in a world of random events.

`SHAREDPOOL_MODEL_EXAMPLES=5000 pytest tests/model` runs for longer, with new examples every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import LIMITS, TTL_S, Worker, World

from sharedpool.wire.messages import ReleaseReason

_EXAMPLES = int(os.environ.get("SHAREDPOOL_MODEL_EXAMPLES", "0"))
PROFILE = settings(
    max_examples=_EXAMPLES or 160,
    stateful_step_count=60,
    derandomize=not _EXAMPLES,
    deadline=None,
    print_blob=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
MOST_WORKERS = 5
MOST_TICKETS = 6

waits = st.sampled_from([0.0, 2.0, 60.0, 60.0, 600.0])


def some(attribute: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Allow a step only when an awake worker has something in `attribute`: no steps are wasted."""
    return precondition(lambda self: any(getattr(worker, attribute) for worker in self.world.awake()))


class LedgerMachine(RuleBasedStateMachine):
    """A network that delivers every message, in order for each session, at its own pace."""

    bad_network = False

    @initialize(cap=st.sampled_from([None, None, 3, 4]))
    def begin(self, cap: int | None) -> None:
        self.world = World(cap)
        self.world.in_order = not self.bad_network
        for pool in LIMITS:
            self.world.start(pool)
            self.world.start(pool)
        self.world.deliver_all()

    # --- drawing

    def one(self, data: st.DataObject, having: str = "") -> Worker | None:
        """Draw a worker that is not frozen and has something in its attribute `having`."""
        found = [worker for worker in self.world.awake() if not having or getattr(worker, having)]
        return self.world.workers[data.draw(st.sampled_from([worker.id for worker in found]))] if found else None

    # --- threads

    @rule(data=st.data(), wait_s=waits)
    def checkout(self, data: st.DataObject, wait_s: float) -> None:
        if worker := self.one(data):
            self.world.checkout(worker, wait_s)

    @rule(data=st.data(), wait_s=waits, times=st.integers(2, 4))
    def checkout_in_threads(self, data: st.DataObject, wait_s: float, times: int) -> None:
        if (worker := self.one(data)) and len(worker.tickets) < MOST_TICKETS:
            for _ in range(times):
                self.world.checkout(worker, wait_s)

    @some("users")
    @rule(data=st.data())
    def checkin(self, data: st.DataObject) -> None:
        if worker := self.one(data, "users"):
            self.world.checkin(worker, data.draw(st.sampled_from(worker.users)))

    @some("users")
    @rule(data=st.data())
    def checkin_all(self, data: st.DataObject) -> None:
        if worker := self.one(data, "users"):
            for conn in list(worker.users):
                self.world.checkin(worker, conn)

    @some("users")
    @rule(data=st.data())
    def checkin_broken(self, data: st.DataObject) -> None:
        if worker := self.one(data, "users"):
            self.world.checkin(worker, data.draw(st.sampled_from(worker.users)), ReleaseReason.BROKEN)

    @some("tickets")
    @rule(data=st.data())
    def collect(self, data: st.DataObject) -> None:
        if worker := self.one(data, "tickets"):
            self.world.collect(worker)

    @some("tickets")
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        if worker := self.one(data, "tickets"):
            in_connect = [lease for lease, _ in worker.opening]
            tickets = [ticket for ticket in worker.tickets if ticket.lease not in in_connect]
            if tickets:
                self.world.give_up(worker, data.draw(st.sampled_from(tickets)))

    @some("connecting")
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def connect(self, data: st.DataObject, fails: bool) -> None:
        if worker := self.one(data, "connecting"):
            lease = worker.connecting[0]
            (self.world.fail_to_connect if fails else self.world.connect)(worker, lease)

    @some("opening")
    @rule(data=st.data(), well=st.sampled_from([True, True, True, False]))
    def opened(self, data: st.DataObject, well: bool) -> None:
        if worker := self.one(data, "opening"):
            lease, conn = worker.opening[0]
            self.world.opened(worker, lease, conn, well=well)

    @some("closing")
    @rule(data=st.data(), seen=st.sampled_from([True, True, True, False]))
    def finish_close(self, data: st.DataObject, seen: bool) -> None:
        if worker := self.one(data, "closing"):
            closing, conn = data.draw(st.sampled_from(worker.closing))
            # Without a known backend nothing could ever confirm its end: see the report on `describe`.
            self.world.finish_close(worker, closing, conn, seen=seen or closing.lease.backend is None)

    # --- network and clock

    @some("up")
    @rule(data=st.data())
    def deliver_up(self, data: st.DataObject) -> None:
        if worker := self.one(data, "up"):
            self.world.deliver_up(worker)

    @some("down")
    @rule(data=st.data())
    def deliver_down(self, data: st.DataObject) -> None:
        if worker := self.one(data, "down"):
            self.world.deliver_down(worker)

    @rule()
    def deliver_all(self) -> None:
        self.world.deliver_all()

    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        if worker := self.one(data):
            self.world.beat(worker)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.1]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(seconds=st.sampled_from([3.0, TTL_S + 1, 50.0]))
    def pass_long(self, seconds: float) -> None:
        self.world.pass_long(seconds)

    @rule()
    def to_the_next_deadline(self) -> None:
        deadline = self.world.ledger.next_deadline()
        if deadline is not None:
            self.world.pass_time(max(0.0, deadline - self.world.now))

    # --- processes

    @precondition(lambda self: len(self.world.workers) < MOST_WORKERS)
    @rule(pool=st.sampled_from(sorted(LIMITS)))
    def start(self, pool: str) -> None:
        self.world.start(pool)

    @precondition(lambda self: len(self.world.workers) > 2)
    @rule(data=st.data(), linger=st.booleans())
    def die(self, data: st.DataObject, linger: bool) -> None:
        self.world.die(self.world.workers[data.draw(st.sampled_from(list(self.world.workers)))], linger=linger)

    @precondition(lambda self: len(self.world.workers) > 2)
    @rule(data=st.data(), exits=st.booleans())
    def leave(self, data: st.DataObject, exits: bool) -> None:
        worker = self.one(data)
        if worker and not worker.connecting and not worker.opening:
            self.world.leave(worker, exits=exits)

    @precondition(lambda self: len(self.world.awake()) > 2)
    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        if worker := self.one(data):
            worker.frozen = True

    @precondition(lambda self: len(self.world.awake()) > 2)
    @rule(data=st.data(), waiters=st.integers(0, 2), fenced=st.booleans())
    def oversleep(self, data: st.DataObject, waiters: int, fenced: bool) -> None:
        """A worker is frozen for longer than its TTL, and wakes up when others may have its slots."""
        if not (sleeper := self.one(data)):
            return
        sleeper.frozen = True
        self.world.pass_long(TTL_S + 1)
        other = self.one(data)
        for _ in range(waiters if other else 0):
            self.world.checkout(other, 60.0)
        self.world.deliver_all()
        for token in sorted(self.world.fences) if fenced else ():
            self.world.answer_fence(token)
        sleeper.frozen = False
        self.world.beat_if_due(sleeper)

    @precondition(lambda self: any(worker.frozen for worker in self.world.workers.values()))
    @rule(data=st.data(), again=st.booleans())
    def thaw(self, data: st.DataObject, again: bool) -> None:
        frozen = [worker.id for worker in self.world.workers.values() if worker.frozen]
        worker = self.world.workers[data.draw(st.sampled_from(frozen))]
        worker.frozen = False
        self.world.beat_if_due(worker)
        if again:  # its link sees that it has heard nothing for long
            self.world.hello(worker)

    @rule(data=st.data())
    def register_again(self, data: st.DataObject) -> None:
        if worker := self.one(data):
            self.world.hello(worker)

    @precondition(lambda self: self.world.dead)
    @rule(data=st.data())
    def notice_death(self, data: st.DataObject) -> None:
        self.world.notice_death(data.draw(st.sampled_from(sorted(self.world.dead))))

    @precondition(lambda self: self.world.fences)
    @rule(data=st.data())
    def answer_fence(self, data: st.DataObject) -> None:
        self.world.answer_fence(data.draw(st.sampled_from(sorted(self.world.fences))))

    @rule(data=st.data())
    def backend_ends_by_itself(self, data: st.DataObject) -> None:
        if self.world.live:
            self.world.end(data.draw(st.sampled_from(sorted(self.world.live, key=lambda backend: backend.pid))))

    # --- promises

    @invariant()
    def safe(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    @precondition(lambda self: not self.bad_network)
    @rule()
    def quiet_moment(self) -> None:
        self.world.quiesce()
        if not any(worker.frozen for worker in self.world.workers.values()):
            self.world.check_nobody_waits_in_vain()

    def teardown(self) -> None:
        if hasattr(self, "world") and not self.bad_network:
            self.world.heal()
            self.world.check_nobody_waits_in_vain()
            self.world.check_all_slots_can_be_had()


class BadNetworkMachine(LedgerMachine):
    """A network that loses, doubles and reorders messages: whatever it does, the promises of safety hold."""

    bad_network = True

    def _line(self, data: st.DataObject) -> object:
        lines = [line for worker in self.world.workers.values() for line in (worker.up, worker.down) if line]
        return data.draw(st.sampled_from(lines), label="line") if lines else None

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if line := self._line(data):
            line.popleft()

    @rule(data=st.data(), late=st.booleans())
    def double(self, data: st.DataObject, late: bool) -> None:
        if line := self._line(data):
            if late:
                line.append(line[0])
            else:
                line.appendleft(line[0])

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        if line := self._line(data):
            line.rotate(-1)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = PROFILE
TestBadNetwork = BadNetworkMachine.TestCase
TestBadNetwork.settings = PROFILE

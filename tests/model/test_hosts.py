"""Many hosts and one limit, in random histories: never more than `max_conn`, over all hosts.

Modelled (`hosts.py` and its neighbours): syncs in any order, late, lost before or after their
commit; sessions that are lost; hosts that are frozen, cut off, killed; brokers that are killed and
restarted, with their journal or without; a server that is restarted, with the table or without;
late and lost NOTIFYs; connects that are under way for as long as they may be.

After every step: the shares add up to no more than the limit, and there are no more connections,
nor can there be without another sync. When the faults have stopped: every host is served as is
fair, one alone can have everything, and nobody syncs more often than it should.

Assumed, as the product does: a host that has gone without a word (its session has ended, and none
of its connections is left) has no connect that reaches the server later than `REACH_S` after that.
Nor has a host that is not back `BACK_S` after a restart of the server, where nobody remembers it.

`SHAREDPOOL_MODEL_EXAMPLES` and `SHAREDPOOL_MODEL_SEED` are as in `test_model.py`.
"""

from __future__ import annotations

import os
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from sharedpool.broker.core.host_presence import CUT_S
from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Phase as LeasePhase
from tests.model.hosts import Host
from tests.model.hosts_promises import (
    check,
    check_everybody_is_served,
    check_fair,
    heal,
    serve,
)
from tests.model.hosts_worker import Held, Worker
from tests.model.hosts_world import World

SEED = int(os.environ.get("SHAREDPOOL_MODEL_SEED", "1"))
EXAMPLES = max(7, int(os.environ.get("SHAREDPOOL_MODEL_EXAMPLES", "7")))
STEPS = 100
PARTS = 2
PROFILE = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    print_blob=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)
picks = st.integers(0, 1023)


class ManyHosts(RuleBasedStateMachine):
    """A step is one rule; `pick` chooses among what is there to be chosen."""

    steps: ClassVar[int] = 0
    most_backends: ClassVar[int] = 0
    world: World

    @initialize(pick=picks)
    def begin(self, pick: int) -> None:
        count = 2 + pick % 2
        limits = [(4, 4, 4), (4, 6, 3), (5, 2, 5)][pick // 2 % 3][:count]
        self.world = World(list(limits), workers=1 + pick // 6 % 2)
        for host in self.world.hosts:
            for worker in host.workers:
                worker.hello()
        if pick // 12 % 4:
            self._crowd(pick // 48 % 5)

    # --- choosing

    def host(self, pick: int) -> tuple[Host, int]:
        hosts = self.world.hosts
        return hosts[pick % len(hosts)], pick // len(hosts)

    def lease(self, pick: int, *phases: LeasePhase) -> tuple[Worker, Held] | None:
        """Choose a lease of a host that runs."""
        found = [
            (worker, held)
            for host in self.world.hosts
            if host.runs
            for worker in host.workers
            for held in worker.leases.values()
            if held.phase in phases
        ]
        return found[pick % len(found)] if found else None

    # --- workers

    @rule(pick=picks)
    def ask(self, pick: int) -> None:
        host, pick = self.host(pick)
        if host.runs:
            worker = host.workers[pick % len(host.workers)]
            for _ in range(1 + pick // 2 % 4):
                if worker.busy < 6:
                    worker.ask(wait_ms=0 if pick // 8 % 8 == 7 else 600_000)

    def _crowd(self, times: int) -> None:
        for host in self.world.hosts:
            for worker in host.workers if host.runs else ():
                for _ in range(times - worker.busy):
                    worker.ask()
        self.world.settle()

    @rule(pick=picks)
    def crowd(self, pick: int) -> None:
        self._crowd(1 + pick % 5)

    @rule(pick=picks)
    def connect(self, pick: int) -> None:
        """A connect takes its next step."""
        if (found := self.lease(pick, LeasePhase.CONNECTING)) is None:
            return
        worker, held = found
        if held.proc is None:
            if held.began_at < self.world.now:
                worker.arrive(held)
            else:
                worker.connect(held)
        elif not worker.host.cut:
            worker.opened(held)

    @rule(pick=picks)
    def checkin(self, pick: int) -> None:
        host, pick = self.host(pick)
        if host.runs:
            for worker in host.workers:
                for held in worker.of(LeasePhase.IN_USE)[: 1 + pick % 6]:
                    worker.checkin(held)

    @rule(pick=picks)
    def withdraw(self, pick: int) -> None:
        host, pick = self.host(pick)
        if host.runs:
            for worker in host.workers:
                while worker.pending:
                    worker.withdraw()

    @rule(pick=picks)
    def close(self, pick: int) -> None:
        if (found := self.lease(pick, LeasePhase.IDLE)) is not None:
            found[0].close(found[1], ReleaseReason.EXPIRED, seen=pick % 3 != 0)

    # --- brokers

    @rule(pick=picks)
    def sync(self, pick: int) -> None:
        host, pick = self.host(pick)
        host.run_order(("done", "done", "done", "done", "before", "after")[pick % 6])

    @rule(pick=picks)
    def hear(self, pick: int) -> None:
        host, pick = self.host(pick)
        host.hear()

    @rule(pick=picks)
    def listen(self, pick: int) -> None:
        host, pick = self.host(pick)
        host.listen()

    @rule(pick=picks)
    def steps_of_one_host(self, pick: int) -> None:
        """Its loop and its thread take turns; perhaps its session is lost in between."""
        host, pick = self.host(pick)
        for _ in range(12):
            pick = (pick * 5 + 3) % 1021
            match pick % 8:
                case 0 | 1:
                    host.run_order(("done", "done", "done", "after")[pick // 8 % 4])
                case 2 | 3:
                    host.hear()
                case 4:
                    self.world.pass_time(0.1, prompt=False)
                case 5 if host.runs:
                    host.workers[0].ask()
                case 6 if pick // 8 % 4 == 0:
                    self.world.lose_session(host)
                case _:
                    host.listen()
            check(self.world)

    @rule(pick=picks)
    def restart_broker(self, pick: int) -> None:
        """The next broker is there at once; its workers come to it one by one."""
        host, pick = self.host(pick)
        if host.runs:
            host.kill_broker(journal_lost=pick % 2 == 0)
            host.start_broker()
            host.workers[0].hello()
            self.world.brokers_work()

    @rule(pick=picks)
    def lose_a_wakeup(self, pick: int) -> None:
        host, pick = self.host(pick)
        host.notifies.clear()

    @rule(pick=picks)
    def work(self, pick: int) -> None:
        host, pick = self.host(pick)
        host.work()
        self.world.server_notices()

    @rule(pick=picks)
    def settle(self, pick: int) -> None:
        self.world.settle()

    # --- time

    @rule(pick=picks)
    def pass_time(self, pick: int) -> None:
        seconds = (0.05, 0.3, 0.5, 1.0, 1.5, 4.0, 10.0, 16.0)[pick % 8]
        self.world.pass_time(seconds, prompt=pick // 8 % 3 != 0)

    @rule(pick=picks)
    def pass_long(self, pick: int) -> None:
        if pick % 4 == 0:
            self.world.pass_time((20.0, CUT_S)[pick // 4 % 2], prompt=True)

    # --- faults

    @rule(pick=picks)
    def lose_session(self, pick: int) -> None:
        host, pick = self.host(pick)
        self.world.lose_session(host)

    @rule(pick=picks)
    def freeze_or_thaw(self, pick: int) -> None:
        host, pick = self.host(pick)
        if host.frozen:
            self.world.thaw(host)
        elif not host.dead:
            host.frozen = True

    @rule(pick=picks)
    def cut_or_heal(self, pick: int) -> None:
        host, pick = self.host(pick)
        host.cut = not host.cut

    @rule(pick=picks)
    def kill_or_start_broker(self, pick: int) -> None:
        host, pick = self.host(pick)
        if host.ledger is not None:
            host.kill_broker(journal_lost=pick % 3 == 0)
        elif host.runs:
            host.start_broker()
            if pick % 2:
                for worker in host.workers:
                    worker.hello()

    @rule(pick=picks)
    def kill_or_start_host(self, pick: int) -> None:
        host, pick = self.host(pick)
        if host.dead:
            self.world.start_host(host)
        elif pick % 4 == 3:
            self.world.kill_host(host)

    @rule(pick=picks)
    def restart_server(self, pick: int) -> None:
        if not self.world.server.up:
            self.world.server.start(self.world.now, crashed=pick % 2 == 0)
        elif pick % 4 == 3:
            self.world.stop_server()
        elif pick % 4:
            self.world.restart_server(crashed=pick // 4 % 2 == 0)

    # --- promises

    @invariant()
    def promises(self) -> None:
        if hasattr(self, "world"):
            type(self).steps += 1
            check(self.world)
            type(self).most_backends = max(self.most_backends, len(self.world.server.connections))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        check(world)
        heal(world)
        world.checks = False
        hosts = len(world.hosts)
        check_everybody_is_served(world, [6, 1, 3][:hosts])
        check_everybody_is_served(world, [5] * hosts)
        alone = [8] + [0] * (hosts - 1)
        serve(world, alone, 12.0, step_s=0.5)
        check_fair(world.server.limit or 0, alone, serve(world, alone, 0.2))
        check_everybody_is_served(world, [1] * hosts)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_hosts(part: int) -> None:
    machine: type[ManyHosts] = type(
        f"ManyHosts{part}", (ManyHosts,), {"steps": 0, "most_backends": 0}
    )
    try:
        run_state_machine_as_test(seed(SEED * 100 + part)(machine), settings=PROFILE)
    except Exception as error:
        error.add_note(
            f"SHAREDPOOL_MODEL_SEED={SEED} SHAREDPOOL_MODEL_EXAMPLES={EXAMPLES} repeat it"
        )
        raise
    print(f"{machine.__name__}: {machine.steps} steps, at most {machine.most_backends} backends")
    if SEED == 1:
        assert machine.steps >= 0.4 * EXAMPLES * STEPS
        assert machine.most_backends >= 4

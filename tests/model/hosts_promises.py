"""What several hosts with one limit promise: after every step, and once the faults have stopped."""

from __future__ import annotations

from sharedpool.broker.core.host_presence import CUT_S
from sharedpool.wire.values import Phase as LeasePhase
from tests.model.hosts_worker import Worker
from tests.model.hosts_world import World


def check(world: World) -> None:
    """S1 over all hosts, in the table and on the server."""
    server = world.server
    held = sum(row.held for row in server.rows.values())
    backends, in_use = len(server.connections), world.in_use()
    if server.limit is not None:
        world.most = max(world.most, server.limit)
        assert held <= world.most, f"the shares add up to {held} of {world.most}: {server.rows}"
        if max(held, world.counted()) <= server.limit:
            world.most = server.limit  # what was opened under a higher limit is gone
    assert backends <= world.most, f"{backends} of {world.most}: {server.connections}"
    assert in_use <= world.most, (
        f"{in_use} of {world.most} may be in use, with {server.connections},"
        f" {[(host.name, len(host.unarrived()), host.free) for host in world.hosts]}"
    )


def check_fair(limit: int, wanted: list[int], served: list[int]) -> None:
    assert sum(served) == min(limit, sum(wanted)), f"{served} of {wanted}, limit {limit}"
    for want, got in zip(wanted, served, strict=True):
        assert got <= want
        assert got == want or got >= max(served) - 1, f"{served} of {wanted}, limit {limit}"


def heal(world: World) -> None:
    """Faults stop, and all connections are checked in."""
    if not world.server.up:
        world.server.start(world.now, crashed=False)
    for host in world.hosts:
        host.cut = False
        world.thaw(host)
        world.start_host(host)
        host.start_broker()
    for _ in range(8):
        _rest(world)
        world.settle()
        world.pass_time(5.0, prompt=True)
        world.settle()
        check(world)
    world.pass_time(CUT_S, prompt=True)
    world.settle()


def _rest(world: World) -> None:
    for host in world.hosts:
        for worker in host.workers:
            while worker.pending:
                worker.withdraw()
            for held in worker.of(LeasePhase.IN_USE):
                worker.checkin(held)


def serve(world: World, wanted: list[int], seconds: float, step_s: float = 0.2) -> list[int]:
    """Have each host use or want so many, and check in all the time; return what they use."""
    until = world.now + seconds
    while True:
        for host, want in zip(world.hosts, wanted, strict=True):
            _want(host.workers, want)
        world.settle()
        check(world)
        if world.now >= until:
            return [
                sum(len(worker.of(LeasePhase.IN_USE)) for worker in host.workers)
                for host in world.hosts
            ]
        world.pass_time(step_s, prompt=True)
        for host in world.hosts:
            for worker in host.workers:
                for held in worker.of(LeasePhase.IN_USE):
                    worker.checkin(held)


def _want(workers: list[Worker], want: int) -> None:
    for number, worker in enumerate(workers):
        own = want // len(workers) + (number < want % len(workers))
        for _ in range(own - worker.busy):
            worker.ask()
        while worker.busy > own and worker.pending:
            worker.withdraw()


def syncs(world: World, since: float) -> list[int]:
    return [sum(at > since for at in host.syncs) for host in world.hosts]


def check_everybody_is_served(world: World, wanted: list[int]) -> None:
    changed_at = world.now
    serve(world, wanted, 3.0)
    for count in syncs(world, changed_at):
        assert count <= 5 * 3.0, f"{count} syncs in 3 s after a change"
    limit = world.server.limit
    assert limit is not None
    before = {name: row.held for name, row in world.server.rows.items()}
    steady_at = world.now
    served = serve(world, wanted, 5.0)
    check_fair(limit, wanted, served)
    assert before == {name: row.held for name, row in world.server.rows.items()}, "no rest"
    contended = sum(wanted) > limit
    for count in syncs(world, steady_at):
        assert count <= (15 if contended else 1), f"{count} syncs in 5 s at rest"

"""Contestants that several rows share: a crew behind each thing one can connect through."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import sharedpool
from tests.bench.crew import Crew, Member, crew, window
from tests.bench.load import sample_of
from tests.bench.peers import OFF, MakeClient, Permanent, Psycopg2Pool, Shared
from tests.bench.pgbouncer import PgBouncer
from tests.bench.report import US, Sample
from tests.bench.runner import Bench, Contestant, Measure
from tests.bench.server import Route
from tests.bench.stunnel import endpoint

US_OFF = f"{US}, handover off"
US_ROLLBACK = f"{US}, reset rollback"
PGBOUNCER = "PgBouncer"
DIRECT = "direct"

MakeMember = Callable[[MakeClient, int], Member]
_brokers = itertools.count(1)


def broker(
    bench: Bench, stack: ExitStack, max_conn: int, dsn: str, ttl: float = 15.0
) -> sharedpool.Broker:
    """Start a broker of the stack's."""
    address = f"ipc://{bench.directory}/broker{next(_brokers)}.sock"
    return stack.enter_context(sharedpool.start_broker(max_conn, address=address, dsn=dsn, ttl=ttl))


def in_a_window(
    bench: Bench, stack: ExitStack, count: int, member: MakeMember, make: MakeClient
) -> Measure:
    """Return what measures processes that `run` in a closed loop, for a window."""
    members = [partial(member, make, number) for number in range(count)]

    def measure(workers: Crew) -> Sample:
        turn = window(bench.warm_s, bench.window_s)
        return sample_of(workers.ask("run", turn), turn)

    def measure_anew() -> Sample:
        with crew(members) as workers:
            return measure(workers)

    if bench.new_processes:
        return measure_anew
    return partial(measure, stack.enter_context(crew(members)))


def shared(
    bench: Bench,
    route: Route,
    count: int,
    member: MakeMember,
    *,
    slots: int,
    threads: bool = False,
    name: str = US,
    options: tuple[tuple[str, Any], ...] = (),
) -> Contestant:
    """sharedpool, `slots` connections in all, with these options of `config_pool`."""

    def open(stack: ExitStack) -> Measure:
        address = broker(bench, stack, slots, route.dsn).address
        return in_a_window(
            bench, stack, count, member, Shared(route.dsn, address, slots, threads, options)
        )

    return Contestant(name, open)


def without_handover(
    bench: Bench, route: Route, count: int, member: MakeMember, *, slots: int
) -> Contestant:
    """sharedpool as it is where connections cannot be handed over."""
    return shared(bench, route, count, member, slots=slots, name=US_OFF, options=OFF)


def behind_endpoint(
    bench: Bench,
    count: int,
    member: MakeMember,
    *,
    slots: int,
    name: str = US,
    options: tuple[tuple[str, Any], ...] = (),
) -> Contestant:
    """sharedpool, by a TLS endpoint on this machine."""

    def open(stack: ExitStack) -> Measure:
        route = stack.enter_context(endpoint(bench.server))
        return shared(bench, route, count, member, slots=slots, options=options).open(stack)

    return Contestant(name, open)


def bouncer(
    bench: Bench,
    route: Route,
    count: int,
    member: MakeMember,
    *,
    slots: int,
    mode: str = "transaction",
    near: bool = False,
    threads: int = 1,
    name: str = PGBOUNCER,
) -> Contestant:
    """Clients that each keep a connection to one PgBouncer, which has `slots` connections to the
    server.

    With more `threads` than one a client keeps as many.
    """

    def open(stack: ExitStack) -> Measure:
        proxy = stack.enter_context(
            PgBouncer(bench.server, route, mode=mode, size=slots, near=near)
        )
        make = Psycopg2Pool(proxy.dsn, threads) if threads > 1 else Permanent(proxy.dsn)
        return in_a_window(bench, stack, count, member, make)

    return Contestant(name, open)


def direct(
    bench: Bench, route: Route, count: int, member: MakeMember, *, name: str = DIRECT
) -> Contestant:
    """Clients that each keep a connection to the server."""
    return Contestant(
        name, lambda stack: in_a_window(bench, stack, count, member, Permanent(route.dsn))
    )

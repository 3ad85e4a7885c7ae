"""Contestants that several rows share: a crew behind each thing one can connect through."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import sharedpool
from bench.crew import Member, crew, window
from bench.load import sample_of
from bench.peers import MakeClient, Permanent, Shared, knows_handover
from bench.pgbouncer import PgBouncer
from bench.report import US, Sample
from bench.runner import Bench, Contestant, Measure, Unavailable
from bench.server import Route

US_OFF = f"{US}, handover off"
PGBOUNCER = "PgBouncer"
DIRECT = "direct"

MakeMember = Callable[[MakeClient, int], Member]
_brokers = itertools.count(1)


def broker(bench: Bench, stack: ExitStack, max_conn: int, dsn: str, ttl: float = 15.0) -> sharedpool.Broker:
    """Start a broker of the stack's."""
    address = f"ipc://{bench.directory}/broker{next(_brokers)}.sock"
    return stack.enter_context(sharedpool.start_broker(max_conn, address=address, dsn=dsn, ttl=ttl))


def in_a_window(bench: Bench, stack: ExitStack, count: int, member: MakeMember, make: MakeClient) -> Measure:
    """Start processes that `run` in a closed loop, and return what measures them for a window."""
    workers = stack.enter_context(crew([partial(member, make, number) for number in range(count)]))

    def measure() -> Sample:
        turn = window(bench.warm_s, bench.window_s)
        return sample_of(workers.ask("run", turn), turn)

    return measure


def shared(
    bench: Bench, route: Route, count: int, member: MakeMember, *, slots: int, off: bool = False, threads: bool = False
) -> Contestant:
    """sharedpool, `slots` connections in all; `off`: without the hand-over."""

    def open(stack: ExitStack) -> Measure:
        if off and not knows_handover():
            raise Unavailable("this sharedpool has no hand-over")
        address = broker(bench, stack, slots, route.dsn).address
        make = Shared(route.dsn, address, slots, "off" if off else "auto", threads)
        return in_a_window(bench, stack, count, member, make)

    return Contestant(US_OFF if off else US, open)


def bouncer(
    bench: Bench,
    route: Route,
    count: int,
    member: MakeMember,
    *,
    slots: int,
    mode: str = "transaction",
    near: bool = False,
    name: str = PGBOUNCER,
) -> Contestant:
    """Clients that each keep a connection to one PgBouncer, which has `slots` connections to the server."""

    def open(stack: ExitStack) -> Measure:
        proxy = stack.enter_context(PgBouncer(bench.server, route, mode=mode, size=slots, near=near))
        return in_a_window(bench, stack, count, member, Permanent(proxy.dsn))

    return Contestant(name, open)


def direct(bench: Bench, route: Route, count: int, member: MakeMember, *, name: str = DIRECT) -> Contestant:
    """Clients that each keep a connection to the server."""
    return Contestant(name, lambda stack: in_a_window(bench, stack, count, member, Permanent(route.dsn)))

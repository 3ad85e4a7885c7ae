"""The ledger alone, in one process: no sockets, and a clock of its own."""

import random
import time
from contextlib import ExitStack
from functools import partial

from bench.crew import Member, crew
from bench.report import Comparison, Metric, Result, Sample
from bench.runner import Bench, Contestant, Measure, Row, take_turns
from sharedpool.broker.commands import Command, Send
from sharedpool.broker.ledger import Ledger
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Acquire,
    Backend,
    Confirm,
    Grant,
    Hello,
    PoolSpec,
    Release,
    ReleaseReason,
    Token,
)

_SIZES = (100, 10_000, 100_000)
_SLOTS = 50
_WAIT_MS = 10_000_000
_FREE_US = Metric("a slot is free", "µs/request")
_TAKEN_US = Metric("others wait", "µs/request")


class Bookkeeper(Member):
    """A process with a ledger that has many sessions.

    `free`: any of them asks for a lease, confirms and releases it. `taken`: all slots are taken, and as many sessions
    again as have one wait; whoever is through goes to the queue's end.
    """

    def __init__(self, sessions: int) -> None:
        self._ledger = Ledger(1, ttl_s=1e9)
        self._now = 0.0
        self._request = 0
        self._ids = [number.to_bytes(16, "big") for number in range(sessions)]
        for number, session in enumerate(self._ids):
            # Two pools: in one the slots are free, in the other they are taken.
            spec = PoolSpec("taken" if number % 2 else "free", _SLOTS, 60_000)
            self._ledger.handle(session, Hello(PROTOCOL_VERSION, number + 1, "", "bench", spec), self._now)
        self._holders: list[tuple[bytes, Token]] = []
        taken = self._ids[1::2]
        for session in taken:
            self._take_in(self._acquire(session))

    def _acquire(self, session: bytes) -> list[Command]:
        self._request += 1
        self._now += 0.0001
        return self._ledger.handle(session, Acquire(self._request, _WAIT_MS), self._now)

    def _take_in(self, commands: list[Command]) -> None:
        self._holders += [
            (command.session, command.message.token)
            for command in commands
            if isinstance(command, Send) and isinstance(command.message, Grant)
        ]

    def _release(self, session: bytes, token: Token) -> list[Command]:
        self._ledger.handle(session, Confirm(token, Backend(token.serial)), self._now)
        return self._ledger.handle(session, Release(token, True, ReleaseReason.OWED), self._now)

    def free(self, requests: int) -> float:
        """Return the µs that one request took."""
        sessions = random.choices(self._ids[::2], k=requests)
        started = time.perf_counter()
        for session in sessions:
            held = self._acquire(session)
            for command in held:
                if isinstance(command, Send) and isinstance(command.message, Grant):
                    self._release(session, command.message.token)
            self._ledger.tick(self._now)
        return (time.perf_counter() - started) / requests * 1e6

    def taken(self, requests: int) -> float:
        """Return the µs that one request took."""
        started = time.perf_counter()
        for _ in range(requests):
            session, token = self._holders.pop(0)
            self._take_in(self._release(session, token))
            self._take_in(self._acquire(session))
            self._ledger.tick(self._now)
        return (time.perf_counter() - started) / requests * 1e6

    def close(self) -> None:
        self._ledger.check_invariants()


def _ledger(bench: Bench, result: Result) -> None:
    requests = bench.scaled(20_000, 3_000)

    def open(stack: ExitStack, sessions: int) -> Measure:
        bookkeeper = stack.enter_context(crew([partial(Bookkeeper, sessions)]))
        bookkeeper.ask("free", requests // 10)
        bookkeeper.ask("taken", requests // 10)
        return lambda: Sample(
            {_FREE_US: bookkeeper.ask("free", requests)[0], _TAKEN_US: bookkeeper.ask("taken", requests)[0]}
        )

    take_turns(bench, result, [Contestant(_name(number), partial(open, sessions=number)) for number in _SIZES])
    result.notes.append(
        f"a request is ACQUIRE, CONFIRM, RELEASE and a tick of the clock, by sessions at random; half of the sessions"
        f" are of a pool whose {_SLOTS} slots are taken and for which all others of them wait"
    )


def _name(sessions: int) -> str:
    return f"{sessions:,} sessions"


ROWS = (
    Row(
        "ledger",
        "ledger alone: time per request at 100, 10,000 and 100,000 sessions",
        "flat within 1.5 ×",
        _ledger,
        tuple(
            Comparison(metric, _name(_SIZES[0]), _name(number))
            for number in _SIZES[1:]
            for metric in (_FREE_US, _TAKEN_US)
        ),
    ),
)

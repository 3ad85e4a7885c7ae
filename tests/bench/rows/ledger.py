"""The ledger alone, in one process: no sockets, and a clock that is only counted up."""

import random
import time
from collections import deque
from contextlib import ExitStack
from functools import partial

from sharedpool.broker.core.commands import Command, Send
from sharedpool.broker.core.ledger import Ledger
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Acquire,
    Confirm,
    Grant,
    Hello,
    Release,
    ReleaseReason,
)
from sharedpool.wire.values import Backend, PoolSpec, Token
from tests.bench.crew import Member, crew
from tests.bench.report import Comparison, Metric, Result, Sample
from tests.bench.runner import Bench, Contestant, Measure, Row, take_turns

_SIZES = (100, 10_000, 100_000)
_SLOTS = 20
_WAIT_MS = 10_000_000
_FREE_US = Metric("a slot is free", "µs/request")
_TAKEN_US = Metric("others wait", "µs/request")


class Bookkeeper(Member):
    """A process with a ledger that has many sessions.

    `taken`: all slots are taken and all other sessions wait; whoever is through goes to the queue's
    end. Else slots are free, and any of the sessions asks.
    """

    def __init__(self, sessions: int, taken: bool) -> None:
        self._ledger = Ledger(1, ttl_s=1e9)
        self._now = 0.0
        self._request = 0
        self._sessions = [number.to_bytes(16, "big") for number in range(sessions)]
        spec = PoolSpec("bench", _SLOTS, 60_000)
        for number, session in enumerate(self._sessions):
            self._ledger.handle(
                session, Hello(PROTOCOL_VERSION, number + 1, "", "bench", spec), self._now
            )
        self._holders: deque[tuple[bytes, Token]] = deque()
        self._taken = taken
        for session in self._sessions if taken else ():
            self._acquire(session)
        self.run(1000)

    def _take_in(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Send) and isinstance(command.message, Grant):
                self._holders.append((command.session, command.message.token))

    def _acquire(self, session: bytes) -> None:
        self._request += 1
        self._now += 0.0001
        self._take_in(self._ledger.handle(session, Acquire(self._request, _WAIT_MS), self._now))

    def _release(self) -> bytes:
        session, token = self._holders.popleft()
        self._ledger.handle(session, Confirm(token, Backend(token.serial)), self._now)
        self._take_in(
            self._ledger.handle(session, Release(token, True, ReleaseReason.RETURN_DUE), self._now)
        )
        return session

    def run(self, requests: int) -> float:
        """Return the µs of processor time that one request took."""
        chosen = random.choices(self._sessions, k=requests)
        started = time.process_time()
        for session in chosen:
            if self._taken:
                session = self._release()
            self._acquire(session)
            if not self._taken:
                self._release()
            self._ledger.tick(self._now)
        return (time.process_time() - started) / requests * 1e6

    def close(self) -> None:
        self._ledger.check_invariants()


def _ledger(bench: Bench, result: Result) -> None:
    requests = bench.scaled(20_000, 3_000)

    def open(stack: ExitStack, sessions: int) -> Measure:
        free, taken = (
            stack.enter_context(crew([partial(Bookkeeper, sessions, each)]))
            for each in (False, True)
        )
        return lambda: Sample(
            {_FREE_US: free.ask("run", requests)[0], _TAKEN_US: taken.ask("run", requests)[0]}
        )

    take_turns(
        bench,
        result,
        [Contestant(_name(number), partial(open, sessions=number)) for number in _SIZES],
    )
    result.notes.append(
        "a request is ACQUIRE, CONFIRM, RELEASE and a tick of the clock; processor time; either "
        "by any session while"
        f" slots are free, or by each in turn while all {_SLOTS} slots are taken and everybody "
        "else waits"
    )


def _name(sessions: int) -> str:
    return f"{sessions:,} sessions"


ROWS = (
    Row(
        "ledger",
        "ledger alone: CPU per request at 100, 10,000 and 100,000 sessions",
        "flat within 1.5 ×",
        _ledger,
        tuple(
            Comparison(metric, _name(_SIZES[0]), _name(number))
            for metric in (_FREE_US, _TAKEN_US)
            for number in _SIZES[1:]
        ),
    ),
)

"""The broker's process under lease requests alone: no pool and no PostgreSQL, raw sockets that
speak the protocol."""

import os
import socket
import time
from collections import deque
from contextlib import ExitStack
from functools import partial
from itertools import count, cycle

import zmq

from sharedpool.wire.codec import decode_to_worker, encode
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Acquire,
    Bye,
    Grant,
    Hello,
    Release,
    ReleaseReason,
    Welcome,
)
from sharedpool.wire.values import PoolSpec, Token
from tests.bench.contestants import broker
from tests.bench.crew import Crew, Member, Window, crew, sleep_until, window
from tests.bench.processes import cpu_s
from tests.bench.report import Comparison, Metric, Result, Sample
from tests.bench.runner import Bench, Contestant, Measure, Row, take_turns

_SESSIONS = (1, 64, 512)
# How many requests are under way at a time, whatever the number of sessions.
_PIPELINE = 64
_CLIENTS = 2
_ANSWER_MS = 20_000
_REQUESTS = Metric("requests", "/s", 0)
_CPU_US = Metric("broker's CPU", "µs/request", 1)


class Session:
    """One raw session."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, limit: int) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, b"bench" + os.urandom(11))
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.RCVTIMEO, _ANSWER_MS)
        self._socket.connect(address)
        self._seen = Token(0, 0)
        spec = PoolSpec("bench", limit, 60_000)
        self._send(Hello(PROTOCOL_VERSION, os.getpid(), socket.gethostname(), "bench", spec))

    def _send(self, message: Hello | Acquire | Release | Bye) -> None:
        self._socket.send(encode(message))

    def welcomed(self) -> None:
        while not isinstance(decode_to_worker(self._socket.recv()), Welcome):
            pass

    def request(self, number: int) -> None:
        self._send(Acquire(number, _ANSWER_MS))

    def finish(self) -> None:
        """Wait for a request's grant, and give the lease back."""
        while not isinstance(message := decode_to_worker(self._socket.recv()), Grant):
            pass
        self._seen = message.token
        self._send(Release(message.token, True, ReleaseReason.UNUSED))

    def close(self) -> None:
        self._send(Bye(self._seen))
        self._socket.close()


class Requester(Member):
    """A process with many sessions, that keeps some requests under way, each session's after the
    last one's."""

    def __init__(self, address: str, sessions: int, pipeline: int, limit: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._sessions = [Session(self._context, address, limit) for _ in range(sessions)]
        for session in self._sessions:
            session.welcomed()
        self._pipeline = pipeline

    def run(self, turn: Window) -> int:
        """Return how many requests were served in the window."""
        done = 0
        numbers = count(1)
        turns = cycle(self._sessions)
        under_way: deque[Session] = deque()
        sleep_until(turn.start)
        while (now := time.monotonic()) < turn.end:
            while len(under_way) < self._pipeline:
                session = next(turns)
                session.request(next(numbers))
                under_way.append(session)
            under_way.popleft().finish()
            done += now >= turn.begin
        for session in under_way:
            session.finish()
        return done

    def close(self) -> None:
        for session in self._sessions:
            session.close()
        self._context.term()


def _broker(bench: Bench, result: Result) -> None:
    def open(stack: ExitStack, sessions: int) -> Measure:
        limit = 2 * _PIPELINE
        process = broker(bench, stack, limit, bench.server.dsn)
        clients = min(_CLIENTS, sessions)

        def measure() -> Sample:
            make = partial(
                Requester, process.address, sessions // clients, _PIPELINE // clients, limit
            )
            with crew([make] * clients) as requesters:
                return _sample(requesters, process.pid, window(bench.warm_s, bench.window_s))

        return measure

    take_turns(
        bench,
        result,
        [Contestant(_name(number), partial(open, sessions=number)) for number in _SESSIONS],
    )
    result.notes.append(
        f"a request is ACQUIRE, GRANT and RELEASE, {_PIPELINE} of them under way at any time; "
        "the clients have to share"
        f" the machine's {os.cpu_count()} processors with the broker"
    )


def _sample(requesters: Crew, pid: int, turn: Window) -> Sample:
    requesters.tell("run", turn)
    sleep_until(turn.begin)
    before = cpu_s(pid)
    sleep_until(turn.end)
    used = cpu_s(pid) - before
    done = sum(requesters.answers())
    return Sample({_REQUESTS: done / turn.length_s, _CPU_US: used / done * 1e6})


def _name(sessions: int) -> str:
    return f"{sessions} session{'s' * (sessions > 1)}"


ROWS = (
    Row(
        "broker",
        "broker: lease requests per second, and CPU per request, at 1, 64 and 512 sessions",
        "≥ 30,000/s; CPU per request flat within 1.5 ×",
        _broker,
        tuple(Comparison(_CPU_US, _name(1), _name(number)) for number in _SESSIONS[1:]),
    ),
)

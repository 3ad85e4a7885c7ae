"""Agents, from their own packages, see every connect and statement as they do with psycopg2.pool:
`tox -e agents`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.handover import SUPPORTED
from tests.agents.recorders import RECORDERS
from tests.support.processes import Worker

if find_spec("ddtrace") is None:
    pytest.skip(
        "the agents' packages are not installed: tox -e agents has them", allow_module_level=True
    )

_numbers = iter(range(1, 1000))
Span = dict[str, Any]
# Sentry looks at frameworks alone.
AT_PSYCOPG2 = sorted(RECORDERS.keys() - {"sentry-sdk"})
# What of a connect's spans says that it is one.
_CONNECTS = ("psycopg2.connect", "psycopg2:connect", "connect")


class Program(Worker):
    program = Path(__file__).with_name("program.py")

    def __call__(self, do: str, **arguments: Any) -> list[Span]:
        spans: list[Span] = self.ask(do, **arguments)
        return spans


Start = Callable[..., Program]


@pytest.fixture
def start(broker: sharedpool.Broker, postgres: EphemeralPostgres) -> Iterator[Start]:
    """A program with psycopg2.pool, or with a pool of ours; all of one test share the latter."""
    options = {"broker": broker.address, "name": f"traced{next(_numbers)}", "max_conn": 3}

    def make(
        pool: str, agent: str, *, activate: str = "first", by_dsn: bool = False, **more: Any
    ) -> Program:
        place: dict[str, Any] = {
            "arguments": [postgres.dsn] if by_dsn else [],
            "keywords": {} if by_dsn else extensions.parse_dsn(postgres.dsn),
        }
        settings: dict[str, Any] = {
            "agent": agent,
            "pool": pool,
            "activate": activate,
            "options": {**options, **more},
        }
        return stack.enter_context(Program(**settings, **place))

    with ExitStack() as stack:
        yield make


def without_connects(spans: list[Span]) -> list[Span]:
    return [span for span in spans if not span["name"].startswith(_CONNECTS)]


@pytest.mark.parametrize("by_dsn", [False, True], ids=["keywords", "dsn"])
@pytest.mark.parametrize("agent", AT_PSYCOPG2)
def test_an_agent_sees_the_same_spans(start: Start, agent: str, by_dsn: bool) -> None:
    theirs, ours = (start(pool, agent, by_dsn=by_dsn) for pool in ("psycopg2", "sharedpool"))
    expected = theirs("start")
    assert len(expected) >= 3 * 7
    assert ours("start") == expected
    assert ours("stats") == [{"adopted": 0, "connects": 1, "hits": 2}]
    assert (
        ours("record", what="three") == theirs("record", what="three") == without_connects(expected)
    )
    assert ours("record", what="many") == theirs("record", what="many")


@pytest.mark.parametrize("agent", AT_PSYCOPG2)
def test_it_is_activated_late(start: Start, agent: str) -> None:
    theirs, ours = (start(pool, agent, activate="late") for pool in ("psycopg2", "sharedpool"))
    for program in (theirs, ours):
        program("activate")
    assert ours("start") == theirs("start") != []


@pytest.mark.parametrize("agent", AT_PSYCOPG2)
def test_it_is_activated_after_the_first_connect(start: Start, agent: str) -> None:
    theirs, ours = (start(pool, agent, activate="late") for pool in ("psycopg2", "sharedpool"))
    for program in (theirs, ours):
        program("start")
        program("activate")
    # What was opened before is not traced, what is opened now is.
    assert ours("record", what="three") == theirs("record", what="three") == []
    assert ours("record", what="many") == theirs("record", what="many") != []


@pytest.mark.skipif(not SUPPORTED, reason="connections cannot be handed over on this platform")
@pytest.mark.parametrize("agent", AT_PSYCOPG2)
def test_a_connection_that_another_process_has_opened(start: Start, agent: str) -> None:
    theirs = start("psycopg2", agent)
    theirs("open")  # outside of what is traced
    expected = theirs("record", what="three")
    a, b = (start("sharedpool", agent, max_conn=1) for _ in range(2))
    a("start")
    # It was no connect. Told to trace these, ddtrace takes its wrapping for one, outside of every
    # request.
    seen = without_connects if agent == "ddtrace with connects" else list
    b("open")
    assert seen(b("record", what="three")) == expected
    (stats,) = b("stats")
    assert stats["adopted"] >= 1
    assert stats["connects"] == 0
    for program in (a, b, a):
        assert seen(program("record", what="three")) == expected
    assert a("stats")[0]["connects"] == 1


@pytest.mark.parametrize("agent", AT_PSYCOPG2)
def test_a_forked_child(start: Start, agent: str) -> None:
    theirs, ours = (start(pool, agent) for pool in ("psycopg2", "sharedpool"))
    expected = theirs("fork")
    ours("start")
    assert ours("fork") == expected != []
    assert ours("record", what="three") == without_connects(expected)


@pytest.mark.parametrize("agent", RECORDERS)
def test_under_sqlalchemy(start: Start, agent: str) -> None:
    theirs, ours = (start(pool, agent) for pool in ("psycopg2", "sharedpool"))
    expected = theirs("record", what="sqlalchemy")
    assert len(expected) >= 2
    assert ours("record", what="sqlalchemy") == expected


@pytest.mark.parametrize("agent", RECORDERS)
def test_under_django(start: Start, agent: str) -> None:
    theirs, ours = (start(pool, agent) for pool in ("psycopg2", "sharedpool"))
    for program in (theirs, ours):
        program("configure_django")
    expected = theirs("record", what="django")
    assert len(expected) >= 2
    assert ours("record", what="django") == expected
    # What Django asks of a new session is not asked again, and, of all but Django itself, there is
    # no connect.
    again = ours("record", what="django")
    again = without_connects(again) if agent == "sentry-sdk" else again
    assert 1 <= len(again) < len(expected)
    assert again == expected[-len(again) :]

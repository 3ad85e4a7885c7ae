"""Fixtures of the fault tests: a server that logs every connection, and an environment for each
test."""

from collections.abc import Iterator

import pytest

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.faults import server_log
from tests.faults.environment import Environment, environment
from tests.faults.results import LONG, LONG_MINUTES, SOAK_S, Row
from tests.faults.row_fixture import pytest_runtest_makereport, row

__all__ = ["pytest_runtest_makereport", "row"]  # pytest finds both here


@pytest.fixture(scope="session")
def logging_postgres() -> Iterator[EphemeralPostgres]:
    """A server for the fault tests of this session."""
    with EphemeralPostgres(max_connections=60, settings=server_log.SETTINGS) as server:
        yield server


def pytest_report_header() -> str | None:
    """Return how long the long version takes."""
    if not LONG:
        return None
    return (
        f"fault rows, long: about {LONG_MINUTES} minutes, and a soak of {SOAK_S / 60:.3g} minutes"
    )


VARIANTS = {"counted": "", "role-limit": "role limit"} if LONG else {"counted": ""}


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    """Without PostgreSQL's own limit on the role, and in the long version with it, too."""
    return str(request.param)


@pytest.fixture
def field(logging_postgres: EphemeralPostgres, row: Row, variant: str) -> Iterator[Environment]:
    """The environment of this test."""
    with environment(logging_postgres, row, role_limit=bool(variant)) as world:
        yield world

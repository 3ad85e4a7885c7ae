"""The fixture `row`, for the conftest.py of each folder whose tests fill a table of faults."""

from collections.abc import Generator, Iterator

import pytest

from tests.faults.results import Row, new_seed

_PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep for the fixture `row` whether its test has passed."""
    report = yield
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    return report


@pytest.fixture
def row(request: pytest.FixtureRequest, variant: str) -> Iterator[Row]:
    """The record of this test; the marker `row(name, fault, goal)` names it."""
    (name, fault, goal) = request.node.get_closest_marker("row").args
    record = Row(name, fault, goal, variant, new_seed())
    print(f"seed: SHAREDPOOL_FAULTS_SEED={record.seed}")  # pytest shows it when the test fails
    yield record
    record.passed = request.node.stash.get(_PASSED, False)
    record.write()
    print(f"{name} {variant}: {record.measured}; {record.errors}; {record.figures}")

"""Fixtures for several hosts: they skip where this machine cannot have them."""

from collections.abc import Iterator

import pytest

from tests.faults.results import Row
from tests.faults.row_fixture import pytest_runtest_makereport, row
from tests.hosts.lab import missing
from tests.hosts.world import World, world

__all__ = ["pytest_runtest_makereport", "row"]  # pytest finds both here


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the rows out unless they are asked for: they take minutes, most of it in silence."""
    if "hosts" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("hosts") is not None:
            item.add_marker(pytest.mark.skip("pytest -m hosts, or tox -e hosts, runs it"))


@pytest.fixture(scope="session")
def namespaces() -> None:
    """What a laboratory needs is there; else the test is skipped."""
    if lacking := missing():
        pytest.skip(lacking)


@pytest.fixture
def variant() -> str:
    """These rows have one variant each."""
    return ""


@pytest.fixture
def field(namespaces: None, row: Row) -> Iterator[World]:
    """The world of this test."""
    with world(row) as made:
        yield made

"""What the frameworks' tests share."""

from collections.abc import Iterator

import pytest
from processes import Sampler

from sharedpool.cli.postgres import EphemeralPostgres


@pytest.fixture
def sampler(postgres: EphemeralPostgres, name: str) -> Iterator[Sampler]:
    """The most backends that the server has at a time."""
    with Sampler(postgres.dsn, f"sharedpool {name} [%") as sampler:
        yield sampler

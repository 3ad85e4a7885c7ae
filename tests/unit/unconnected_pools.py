"""Pools that never connect: each test begins without any."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedpool import config

DSN = "host=db.example user=app dbname=app password=s3cr3t"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, runtime_dir: Path) -> Iterator[None]:
    monkeypatch.setattr(config, "_current", {})
    yield
    for pool in config._current.values():
        if not pool.disposed:
            pool.release_all()

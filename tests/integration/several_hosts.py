"""Workers on several hosts: runtime directories, each with an automatic broker of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Worker

MakeHost = Callable[..., Worker]


def log_of(host: Path) -> str:
    return "".join(path.read_text() for path in host.glob("sharedpool/*.log"))


@pytest.fixture
def on_host(
    database: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeHost]:
    """Return a function that starts a worker on a host, by the host's name."""
    monkeypatch.setenv("SHAREDPOOL_LINGER", "0.3")
    with ExitStack() as stack:

        def start(host: str, **settings: Any) -> Worker:
            directory = runtime_dir / host
            directory.mkdir(mode=0o700, exist_ok=True)
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
            return stack.enter_context(Worker(**{"dsn": database, **settings}))

        yield start

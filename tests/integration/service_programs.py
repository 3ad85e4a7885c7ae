"""The programs that the files in examples/ say are run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sharedpool.cli.client import fetch_report
from sharedpool.errors import BrokerUnavailable
from sharedpool.postgres.throwaway_server import EphemeralPostgres

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND = [sys.executable, "-m", "sharedpool"]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, postgres: EphemeralPostgres) -> None:
    """PATH has this environment's commands, DATABASE_DSN tells the server."""
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    monkeypatch.setenv("DATABASE_DSN", postgres.dsn)


@contextmanager
def started(command: list[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **more
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def serves(address: str) -> bool:
    try:
        return fetch_report(address, 1.0).state in ("serving", "waiting")
    except BrokerUnavailable:
        return False

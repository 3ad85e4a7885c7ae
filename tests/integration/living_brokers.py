"""The brokers in a runtime directory, made to leave soon after their last worker."""

import contextlib
from pathlib import Path

import pytest

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.discovery.lock_file import is_held
from sharedpool.wire.reports import Report


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHAREDPOOL_LINGER", "0.5")


def living(directory: Path) -> list[Report]:
    """The reports of all brokers in a runtime directory."""
    reports = []
    for path in sorted((directory / "sharedpool").glob("*.sock")):
        if is_held(Path(f"{path}.lock")):
            with contextlib.suppress(sharedpool.BrokerUnavailable):  # it left just now
                reports.append(fetch_report(f"ipc://{path}", timeout_s=1))
    return reports

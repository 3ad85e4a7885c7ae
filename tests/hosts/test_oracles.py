"""The oracles of several hosts themselves: each sees what it is there to see."""

from pathlib import Path

import pytest

from tests.faults.server_log import ServerLog
from tests.hosts.backends import NAMES_PATTERN, Counts, Timeline
from tests.hosts.lab import missing


def test_what_is_missing_for_several_hosts_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (told,) = missing().splitlines()
    assert "ip and nsenter" in told


def timeline(*entries: tuple[float, Counts]) -> Timeline:
    made = Timeline()
    for at, counts in entries:
        made.add(at, counts)
    return made


def test_the_log_counts_the_pools_connections_and_not_the_brokers_own(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    log = ServerLog(path)
    authorized = "[app] LOG:  connection authorized: user=app database=app application_name="
    lines = [
        f"2.1 10 {authorized}sharedpool hosts [12ab34cd]",
        f"2.2 11 {authorized}sharedpool broker 12ab34cd",
        f"2.3 12 {authorized}sharedpool other pool [99ab34cd]",
        f"2.4 13 {authorized}psql",
        "2.5 11 [app] LOG:  disconnection: session time: 0:00:00.3 user=app",
        "2.6 10 [app] LOG:  disconnection: session time: 0:00:00.5 user=app",
        f"2.7 14 {authorized}sharedpool hosts [12ab34cd]",
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    depth = log.depth("app", NAMES_PATTERN)
    assert (depth.peak, depth.backends, depth.alive) == (2, 3, {12, 14})
    assert log.depth("app").backends == 5


def test_the_peak_is_over_all_hosts_at_one_moment() -> None:
    seen = timeline(
        (1.0, {"a": 7}), (2.0, {"a": 3, "b": 3}), (3.0, {"b": 6}), (4.0, {"a": 5, "b": 3})
    )
    assert seen.peak == 8
    assert seen.at_peak() == {"a": 5, "b": 3}
    assert timeline().peak == 0


def test_what_does_not_change_is_one_entry() -> None:
    assert len(timeline((1.0, {"a": 7}), (2.0, {"a": 7}), (3.0, {})).entries) == 2


def test_the_first_moment_is_looked_for_from_a_given_one_on() -> None:
    seen = timeline((1.0, {"a": 2}), (2.0, {"a": 1}), (3.0, {"a": 2}), (4.0, {}))

    def two(counts: Counts) -> bool:
        return counts.get("a") == 2

    assert seen.first(0.5, two) == 1.0
    assert seen.first(1.5, two) == 1.5  # as it was before, so it is at first
    assert seen.first(2.5, two) == 3.0
    assert seen.first(4.0, two) is None
    assert seen.first(9.0, lambda counts: not counts) == 9.0
    assert timeline().first(0.0, two) is None

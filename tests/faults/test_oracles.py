"""The oracles themselves: each sees what it is there to see."""

from pathlib import Path

from events import Event, checkouts, failures, files, overlaps
from serverlog import ServerLog


def _log(path: Path, *lines: str) -> ServerLog:
    path.write_text("1.5 7 [app] LOG:  connection authorized: of before\n")
    log = ServerLog(path)
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    return log


def test_the_log_is_as_deep_as_backends_lived_at_the_same_time(tmp_path: Path) -> None:
    log = _log(
        tmp_path / "log",
        "2.1 10 [app] LOG:  connection authorized: user=app",
        "2.2 11 [app] LOG:  connection authorized: user=app",
        "2.3 12 [postgres] LOG:  connection authorized: user=postgres",
        "2.4 10 [app] LOG:  disconnection: session time: 0:00:00.3 user=app",
        "2.5 13 [app] LOG:  connection authorized: user=app",
    )
    depth = log.depth("app")
    assert (depth.peak, depth.backends, depth.alive) == (2, 3, {11, 13})
    assert depth.ended_at(10, start=2.05) == 2.4
    assert depth.ended_at(10, start=2.45) is None  # that one came later


def test_the_log_tells_an_overshoot_that_the_roles_limit_refused(tmp_path: Path) -> None:
    log = _log(
        tmp_path / "log",
        "2.1 10 [app] LOG:  connection authorized: user=app",
        "2.2 11 [app] LOG:  connection authorized: user=app",
        '2.2 11 [app] FATAL:  too many connections for role "app"',
    )
    depth = log.depth("app")
    assert (depth.peak, depth.alive, depth.refused) == (2, {10}, [2.2])


def test_a_crashed_server_leaves_no_backends(tmp_path: Path) -> None:
    log = _log(
        tmp_path / "log",
        "2.1 10 [app] LOG:  connection authorized: user=app",
        "2.2 99 [] LOG:  starting PostgreSQL 16",
        "2.3 11 [app] LOG:  connection authorized: user=app",
    )
    assert log.depth("app").peak == 1


def _life(begin: float, end: float | None, pid: str = "50", start: str = "1.0") -> list[Event]:
    events = [Event(begin - 0.5, "ask", ("1",)), Event(begin, "out", (pid, start, "0"))]
    return events if end is None else [*events, Event(end, "in", (pid,))]


def test_two_checkouts_of_one_backend_at_a_time_overlap() -> None:
    assert len(overlaps(checkouts({"1": _life(1, 3), "2": _life(2, 4)}), {})) == 1
    assert not overlaps(checkouts({"1": _life(1, 2), "2": _life(2, 4)}), {})
    assert not overlaps(checkouts({"1": _life(1, 3), "2": _life(2, 4, start="9.0")}), {})  # the pid came again


def test_a_checkout_lasts_until_its_worker_was_killed() -> None:
    found = checkouts({"1": _life(1, None), "2": _life(2, 4)})
    assert len(overlaps(found, {})) == 1
    assert len(overlaps(found, {"1": 3.0})) == 1
    assert not overlaps(found, {"1": 1.5})


def test_a_last_line_without_its_end_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "3.events").write_text("1.0 ask 2\n1.5 fail PoolTimeout None too late\n2.0 as")
    (found,) = checkouts(files(tmp_path))
    assert (found.worker, found.failure, found.waited) == ("3", "PoolTimeout", 0.5)
    assert failures([found]) == {"PoolTimeout": 1}

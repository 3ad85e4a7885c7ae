"""The oracles themselves: each sees what it is there to see."""

import json
import subprocess
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.faults import report
from tests.faults.events import Checkout, Event, checkouts, failures, files, moves, overlaps
from tests.faults.oracles import Evidence, violations
from tests.faults.results import Row
from tests.faults.role_sampler import RoleSampler
from tests.faults.server_log import Depth, ServerLog
from tests.support.waiting import wait_until


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
    assert not overlaps(
        checkouts({"1": _life(1, 3), "2": _life(2, 4, start="9.0")}), {}
    )  # the pid came again


def test_a_backend_that_two_workers_used_has_moved() -> None:
    found = [
        Checkout(worker, 0.0, 1.0, answered=at, backend=("7", "1"), end=at + 0.5)
        for worker, at in (("a", 1.0), ("b", 2.0), ("b", 3.0), ("a", 4.0))
    ]
    assert moves(found) == 2
    assert moves(found[1:3]) == 0


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


def _evidence(**planted: Any) -> Evidence:
    """A run that kept every promise, but for what is planted."""
    lives = checkouts({"1": _life(1, 2), "2": _life(2, 4)})
    log = Depth(peak=10, backends=12)
    return replace(Evidence(10, log, 10, lives, {}, took=10, took_s=0.2), **planted)


def test_a_run_that_kept_every_promise_is_found_good() -> None:
    assert violations(_evidence(), 2.0) == []


def test_an_eleventh_backend_in_the_log_is_an_overshoot(tmp_path: Path) -> None:
    connects = [
        f"2.{pid} {pid} [app] LOG:  connection authorized: user=app" for pid in range(11, 22)
    ]
    seen = _evidence(log=_log(tmp_path / "log", *connects).depth("app"))
    (wrong,) = violations(seen, 2.0)
    assert seen.overshoot == 1
    assert wrong.startswith("more than 10 backends: 2.21 21 [app]")


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"sampled_peak": 11}, "more than 10 backends"),
        ({"took": 9}, "only 9 of 10 slots"),
        ({"took_s": 2.1}, "all slots only after 2.10 s"),
        ({"found": checkouts({"1": _life(1, 3), "2": _life(2, 4)})}, "used twice at a time"),
        (
            {
                "found": checkouts(
                    {"1": [Event(1, "ask", ("1",)), Event(2, "out", ("50", "1.0", "2"))]}
                )
            },
            "transaction",
        ),
        ({"found": checkouts({"1": [*_life(1, 2), Event(3, "ask", ("1",))]})}, "never answered"),
        ({"found": []}, "nobody was lent anything"),
        ({"log": Depth()}, "the log tells of 0 backends"),
        ({"sampled_peak": 0}, "the sampler has seen no backend"),
    ],
)
def test_each_broken_promise_is_found(planted: dict[str, Any], words: str) -> None:
    (wrong,) = violations(_evidence(**planted), 2.0)
    assert words in wrong


def test_a_question_of_a_killed_worker_need_not_be_answered() -> None:
    found = checkouts({"1": [*_life(1, 2), Event(3, "ask", ("1",))]})
    assert violations(_evidence(found=found, killed={"1": 3.5}), 2.0) == []


def test_the_servers_own_log_and_list_show_one_backend_too_many(
    logging_postgres: EphemeralPostgres,
) -> None:
    """The real server's words, that the log's oracle reads them as they are."""
    log = ServerLog(logging_postgres.log_path)
    sampler = RoleSampler(logging_postgres.dsn, "greedy")
    with closing(psycopg2.connect(logging_postgres.dsn)) as admin, admin.cursor() as cursor:
        cursor.execute("CREATE ROLE greedy LOGIN")
        admin.commit()
    sampler.start()
    try:
        with ExitStack() as stack:
            for _ in range(11):
                stack.enter_context(closing(psycopg2.connect(logging_postgres.dsn, user="greedy")))
            sampler.wait_for(11, 10)
        wait_until(lambda: not log.depth("greedy").alive, 10, "the disconnections to be in the log")
    finally:
        sampler.stop()
    depth = log.depth("greedy")
    seen = _evidence(log=depth, sampled_peak=sampler.peak)
    assert (depth.peak, depth.backends, sampler.peak, seen.overshoot) == (11, 11, 11, 1)


def _report(directory: Path, **row: Any) -> tuple[str, int]:
    (directory / f"{row['variant']}.json").write_text(
        json.dumps(asdict(replace(Row("x", "f", "g", "", 1), **row)))
    )
    command = [sys.executable, report.__file__, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout, done.returncode


def test_the_report_shows_the_worse_variant(tmp_path: Path) -> None:
    good = {"passed": True, "overshoot": 0, "leaked": 0}
    text, status = _report(tmp_path, variant="", measured="in 1 s", worst=1.0, **good)
    assert ("| f | g | in 1 s | 0 | 0 |" in text, status) == (True, 0)
    text, status = _report(tmp_path, variant="role limit", measured="in 2 s", worst=2.0, **good)
    assert ("| f | g | in 2 s | 0 | 0 |" in text, status) == (True, 0)
    text, status = _report(tmp_path, variant="role limit", passed=False, overshoot=1)
    assert ("| f | g | nothing **(failed)** | 1 | 0? |" in text, status) == (True, 1)


def test_the_report_of_several_hosts_misses_no_row_of_one_host(tmp_path: Path) -> None:
    row = Row("host-frozen", "fault", "goal", "", 7, passed=True, overshoot=0, leaked=0)
    (tmp_path / "host-frozen.json").write_text(json.dumps(asdict(row)))
    words = report.footnotes(report.load(tmp_path))
    (missing,) = [line for line in words.splitlines() if line.startswith("Not run:")]
    assert "host-cut-off" in missing
    assert "sigstop" not in missing

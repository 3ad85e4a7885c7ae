"""The Python of the automatic broker, where sys.executable is none: servers that embed Python,
frozen applications."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool.broker.launch import interpreter
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support import automatic_broker

# What an application does. It imports nothing but sharedpool, and tells when it begins.
APPLICATION = """
import json, os, sys, time
with open(os.environ["STARTS"], "a") as starts:
    print(os.getpid(), *sys.argv[1:], file=starts)
given = json.loads(os.environ["GIVEN"])
sys.path[:0] = given.get("path", [])
for name, value in given.get("sys", {}).items():
    setattr(sys, name, value)
if given.get("sys", {}).get("prefix"):
    import sysconfig
    sysconfig.get_config_var = {}.get  # the build's folder
import sharedpool
pool = sharedpool.config_pool(max_conn=2, dsn=os.environ["DSN"], broker=given.get("broker"))
begun = time.monotonic()
try:
    with pool.connection(timeout=30) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT 'works'")
        said = cursor.fetchone()[0]
        print(json.dumps([said, time.monotonic() - begun]), flush=True)
        sys.stdin.read()
except sharedpool.PoolError as error:
    print(json.dumps([str(error), time.monotonic() - begun]), flush=True)
"""
PACKAGES = [
    str(Path(sharedpool.__file__).parents[1]),
    *(path for path in sys.path if path.endswith("-packages")),
]


class Running:
    """An application that was started: what it said first, and how it may end."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        # A file: they may be more than a pipe takes before somebody reads.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end()
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            stderr=self._errors,
            text=True,
            cwd="/",
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.said: Any
        self.seconds: float
        self.said, self.seconds = json.loads(line) if line else (self.end(), 0.0)

    def end(self) -> str:
        self._process.communicate(timeout=30)
        with self._errors:
            self._errors.seek(0)
            return self._errors.read()


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    """A line for each time that the application was started."""
    return tmp_path / "starts"


@pytest.fixture
def environment(
    postgres: EphemeralPostgres, runtime_dir: Path, starts: Path
) -> Iterator[dict[str, str]]:
    """What an application is given; in the end nobody must use the broker any more."""
    with automatic_broker.seen_off():
        yield {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "STARTS": str(starts),
            "DSN": postgres.dsn,
            "GIVEN": "{}",
        }


@pytest.fixture
def server(tmp_path: Path, starts: Path) -> Path:
    """A program that must not be started: a web server with Python in it, say, or the
    application."""
    path = tmp_path / "server"
    path.write_text(f'#!/bin/sh\necho server "$@" >> {starts}\nexec sleep 60\n')
    path.chmod(0o755)
    return path


def run(environment: dict[str, str], python: str = sys.executable, **given: Any) -> Running:
    return Running(
        [python, "-c", APPLICATION], environment | {"GIVEN": json.dumps({"path": PACKAGES} | given)}
    )


def the_brokers_python() -> str:
    (report,) = automatic_broker.reports()
    return automatic_broker.command(report)[0]


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize("executable", ["a server", "", None, "a folder", "not there"])
def test_a_process_whose_executable_is_no_python_has_the_one_of_its_environment(
    environment: dict[str, str], server: Path, starts: Path, executable: str | None
) -> None:
    """uWSGI says that it is itself; mod_wsgi may say nothing."""
    names = {
        "a server": str(server),
        "a folder": str(server.parent),
        "not there": str(server.parent / "python3"),
    }
    running = run(environment, sys={"executable": names.get(executable or "", executable)})
    assert running.said == "works"
    assert Path(the_brokers_python()).parent == Path(sys.prefix, "bin")
    running.end()
    assert len(starts.read_text().splitlines()) == 1


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="this is no virtual environment")
def test_the_environments_python_goes_before_the_one_it_is_a_link_to(
    environment: dict[str, str],
) -> None:
    """As under pyuwsgi, whose sys.executable is the Python that the environment was made of."""
    running = run(environment, sys={"executable": os.path.realpath(sys.executable)})
    assert running.said == "works"
    assert Path(the_brokers_python()).parent == Path(sys.prefix, "bin")
    running.end()


@pytest.mark.parametrize("home", [False, True], ids=["sys.path", "PYTHONHOME"])
def test_the_broker_is_given_the_paths_by_which_the_application_has_its_packages(
    environment: dict[str, str], home: bool
) -> None:
    """As with `uwsgi --pythonpath`: the Python that is found has no sharedpool of its own."""
    base = os.path.realpath(sys.executable)
    if home:
        environment |= {"PYTHONHOME": sys.base_prefix}
    running = run(environment, base)
    assert running.said == "works"
    assert (
        Path(the_brokers_python()).parent != Path(sys.prefix, "bin")
        or sys.prefix == sys.base_prefix
    )
    running.end()


def test_where_no_python_is_found_the_error_says_at_once_what_to_do(
    environment: dict[str, str], server: Path, starts: Path
) -> None:
    nowhere = dict.fromkeys(
        ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix"), "/nonexistent"
    )
    config = {"executable": str(server), "_base_executable": str(server), **nowhere}
    running = run(environment, sys=config)
    assert "no Python was found that has this sharedpool" in running.said
    assert str(server) in running.said
    assert (
        "start `sharedpool broker` yourself, and give its address to config_pool(broker=)"
        in running.said
    )
    assert running.seconds < 5
    running.end()
    assert len(starts.read_text().splitlines()) == 1


@pytest.mark.parametrize("what", ["another version", "no sharedpool"])
def test_a_program_called_python_must_show_that_it_has_this_sharedpool(
    environment: dict[str, str], server: Path, starts: Path, what: str
) -> None:
    """It is told nothing before that: the settings have a password in them."""
    fake = server.parent / "python3"
    words = {
        "another version": f'echo "{interpreter.GREETING}9.9"; cat >> {starts}',
        "no sharedpool": "echo 'No module named sharedpool' >&2; exit 1",
    }
    fake.write_text(f"#!/bin/sh\n{words[what]}\n")
    fake.chmod(0o755)
    nowhere = dict.fromkeys(
        ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix"), "/nonexistent"
    )
    config = {"executable": str(fake), "_base_executable": str(fake), **nowhere}
    running = run(environment, sys=config)
    reasons = {
        "another version": f"{fake}: it has sharedpool.broker 9.9, not {interpreter.greeting()}",
        "no sharedpool": f"{fake}: No module named sharedpool",
    }
    assert reasons[what] in running.said
    running.end()
    assert "password" not in starts.read_text()
    assert len(starts.read_text().splitlines()) == 1


def test_a_python_that_says_something_at_its_start_may_still_be_one(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('a word of the site')\n")
    environment |= {"PYTHONPATH": str(tmp_path), "GIVEN": json.dumps({"path": PACKAGES})}
    command = [sys.executable, "-c", "import sys; sys.stdout = sys.__stdout__\n" + APPLICATION]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a word of the site\n"
        assert json.loads(process.stdout.readline())[0] == "works"
        assert process.stdin is not None
        process.stdin.close()


def test_an_environment_that_has_python_say_much_does_not_stop_it(
    environment: dict[str, str],
) -> None:
    running = run(environment | {"PYTHONVERBOSE": "1"})
    assert running.said == "works"
    running.end()


# --- frozen applications


def test_a_frozen_application_is_told_at_once_what_to_do(
    environment: dict[str, str], server: Path, starts: Path
) -> None:
    """Though its folder may have something called python in it, and the machine too."""
    running = run(environment, sys={"frozen": True, "executable": str(server)})
    assert (
        f"this is a frozen application ({server}), which has no Python to run one" in running.said
    )
    assert (
        "start `sharedpool broker` yourself, and give its address to config_pool(broker=)"
        in running.said
    )
    assert running.seconds < 5
    running.end()
    assert len(starts.read_text().splitlines()) == 1


def test_pyinstallers_application_works_with_a_broker_that_it_is_given(
    environment: dict[str, str], starts: Path, tmp_path: Path, postgres: EphemeralPostgres
) -> None:
    pytest.importorskip("PyInstaller", reason="pip install pyinstaller")
    (tmp_path / "app.py").write_text(APPLICATION)
    builds = [
        sys.executable,
        "-m",
        "PyInstaller",
        "--noconfirm",
        "--onedir",
        "--log-level",
        "ERROR",
    ]
    builds += [
        "--paths",
        os.pathsep.join(PACKAGES),
        "--exclude-module",
        "sharedpool.integrations",
        "app.py",
    ]
    subprocess.run(builds, cwd=tmp_path, check=True, capture_output=True, timeout=110)
    program = str(tmp_path / "dist" / "app" / "app")
    running = Running([program, "argument"], environment)
    assert f"this is a frozen application ({program})" in running.said
    running.end()
    assert len(starts.read_text().splitlines()) == 1
    with sharedpool.start_broker(2, dsn=postgres.dsn) as broker:
        running = Running(
            [program], environment | {"GIVEN": json.dumps({"broker": broker.address})}
        )
        assert running.said == "works"
        running.end()
    assert len(starts.read_text().splitlines()) == 2


def test_start_broker_starts_no_other_program_either(
    environment: dict[str, str], server: Path, starts: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = {PACKAGES!r}\n"
        "import sharedpool\n"
        "if __name__ == '__main__':\n"
        f"    sys.executable = {str(server)!r}\n"
        "    with sharedpool.start_broker(1) as broker:\n"
        "        print('alive', broker.is_alive)\n"
        "    sys.frozen = True\n"
        "    try:\n"
        "        sharedpool.start_broker(1)\n"
        "    except sharedpool.BrokerUnavailable as error:\n"
        "        print(error)\n"
    )
    outcome = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert outcome.stdout.startswith("alive True\n"), outcome.stderr
    assert "frozen application" in outcome.stdout
    assert not starts.exists()


def test_the_builds_own_folder_is_looked_in() -> None:
    """Where a server embeds a Python that is not in an environment."""
    folder = sysconfig.get_config_var("BINDIR")
    names = [path for path in interpreter.candidates() if os.path.dirname(path) == folder]
    assert names or not shutil.which(f"python3.{sys.version_info.minor}", path=folder)

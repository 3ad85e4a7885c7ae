"""The broker under systemd: sd_notify is heard, the units are sound, their sockets are used."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.integration.service_programs import COMMAND, EXAMPLES, environment, serves, started
from tests.support.processes import Worker
from tests.support.waiting import wait_until

__all__ = ["environment"]  # pytest finds it here


@contextmanager
def supervisor_socket(address: str) -> Iterator[socket.socket]:
    """What systemd listens at: a datagram socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(30)
        listener.bind("\0" + address[1:] if address.startswith("@") else address)
        yield listener


@pytest.mark.long_variants
@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_hears_when_the_broker_serves_and_when_it_ends(
    kind: str, runtime_dir: Path
) -> None:
    if kind == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets are Linux's")
    notify = f"{runtime_dir}/notify" if kind == "path" else f"@sharedpool-test-{os.getpid()}"
    address = f"ipc://{runtime_dir}/broker.sock"
    environment = dict(os.environ, NOTIFY_SOCKET=notify)
    with (
        supervisor_socket(notify) as listener,
        started(
            [*COMMAND, "broker", "--max-conn", "2", "--bind", address], env=environment
        ) as process,
    ):
        assert listener.recv(100) == b"READY=1"
        assert serves(address)
        process.terminate()
        assert listener.recv(100) == b"STOPPING=1"
        assert process.wait(20) == 0


def test_a_socket_that_nobody_listens_at_keeps_nobody_from_serving(runtime_dir: Path) -> None:
    address = f"ipc://{runtime_dir}/broker.sock"
    environment = dict(os.environ, NOTIFY_SOCKET=f"{runtime_dir}/nobody")
    with started(
        [*COMMAND, "broker", "--max-conn", "2", "--bind", address], env=environment
    ) as process:
        wait_until(lambda: serves(address), timeout_s=30)
        process.terminate()
        assert process.wait(20) == 0


def test_only_the_broker_that_is_a_service_speaks_for_it(runtime_dir: Path) -> None:
    """Under `sharedpool run` the command is the service: READY is its to say."""
    notify = f"{runtime_dir}/notify"
    say = "import os, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM);"
    say += " s.sendto(b'the command', os.environ['NOTIFY_SOCKET'])"
    with supervisor_socket(notify) as listener:
        done = subprocess.run(
            [*COMMAND, "run", "--max-conn", "2", "--", sys.executable, "-c", say],
            env=dict(os.environ, NOTIFY_SOCKET=notify),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert listener.recv(100) == b"the command"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(100)


def unit(name: str, **replaced: str) -> str:
    text = (EXAMPLES / "systemd" / name).read_text()
    for old, new in {"/usr/local/bin/": f"{Path(sys.executable).parent}/", **replaced}.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", ["sharedpool.service", "sharedpool.socket", "gunicorn.service"])
def test_systemd_finds_nothing_wrong_with_the_units(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for each in ("sharedpool.service", "gunicorn.service"):
        (tmp_path / each).write_text(unit(each))
    (tmp_path / "sharedpool.socket").write_text(
        (EXAMPLES / "systemd" / "sharedpool.socket").read_text()
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_units_command_starts_the_broker_and_says_so(
    environment: None, runtime_dir: Path
) -> None:
    text = unit(
        "sharedpool.service",
        **{"/run/sharedpool": str(runtime_dir), "127.0.0.1:9187": "127.0.0.1:0"},
    )
    settings = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    notify = f"{runtime_dir}/notify"
    more = {"SHAREDPOOL_MAX_CONN": "2", "NOTIFY_SOCKET": notify}
    with (
        supervisor_socket(notify) as listener,
        started(shlex.split(settings["ExecStart"]), env=dict(os.environ, **more)) as process,
    ):
        assert settings["Type"] == "notify"
        assert listener.recv(100) == b"READY=1"
        assert serves(f"ipc://{runtime_dir}/broker.sock")
        process.send_signal(signal.SIGTERM)
        assert process.wait(int(settings["TimeoutStopSec"])) == 0


ACTIVATE = shutil.which("systemd-socket-activate")


@pytest.mark.skipif(ACTIVATE is None, reason="systemd-socket-activate is not installed")
@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_broker_is_started_by_who_wants_it_at_a_socket_that_is_not_its_own(
    kind: str, postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ACTIVATE is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = (
            f"{runtime_dir}/broker.sock" if kind == "ipc" else f"127.0.0.1:{free.getsockname()[1]}"
        )
    # It waits for the first connection, then becomes the broker.
    command = [
        ACTIVATE,
        "-l",
        place,
        *COMMAND,
        "broker",
        "--max-conn",
        "2",
        "--dsn",
        postgres.dsn,
        "--ttl",
        "3",
    ]
    with started(command, env=os.environ) as process:
        address = f"{kind}://{place}"
        with Worker(dsn=postgres.dsn, broker=address) as worker:
            assert "backend" in worker.ask("get", name="x", timeout=20)
            (session,) = fetch_report(address).sessions
            assert session.pid == worker.pid
            worker.ask("put", name="x")
        process.terminate()
        assert process.wait(20) == 0
    if kind == "ipc":
        assert Path(place).is_socket()  # not the broker's to remove


@pytest.mark.parametrize(("count", "complaint"), [("2", "one socket"), ("1", "--bind")])
def test_a_socket_that_cannot_be_used_is_said_so(
    count: str, complaint: str, runtime_dir: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{runtime_dir}/other.sock")
        listener.listen()
        start = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = "
            "str(os.getpid());"
            " os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        )
        broker = [
            "-m",
            "sharedpool",
            "broker",
            "--max-conn",
            "1",
            "--bind",
            f"ipc://{runtime_dir}/broker.sock",
        ]
        done = subprocess.run(
            [sys.executable, "-c", start, str(listener.fileno()), *broker],
            env=dict(os.environ, LISTEN_FDS=count),
            pass_fds=[listener.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, complaint in done.stderr) == (2, True), done.stderr

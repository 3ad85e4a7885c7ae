"""`sharedpool top` in a real terminal, and without one."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool.descriptors.readable import readable
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.commands import COMMAND, sharedpool_command, start, wait_for
from tests.support.processes import Worker
from tests.support.waiting import wait_until

pytest.importorskip("rich")

# Makes the terminal its own, as a shell's child has it: Ctrl-C and Ctrl-Z are the terminal's to
# send.
_LOGIN = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
_ENTER, _LEAVE, _HIDE, _SHOW = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A command in a terminal of its own. `screen()` is what it shows now."""

    def __init__(
        self, *arguments: str, rows: int = 24, columns: int = 80, **environment: str
    ) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._theirs = (
            theirs  # kept open, so that the settings can be looked at when the command has ended
        )
        self.before = termios.tcgetattr(theirs)
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOGIN, *COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | environment,
        )

    def read(self) -> str:
        """Read the available output."""
        while readable([self._ours], 0):
            try:
                self.output += os.read(self._ours, 65536).decode()
            except OSError:
                break  # hung up
        return self.output

    def screen(self) -> list[str]:
        """The lines of the newest picture that is complete."""
        pictures = self.read().split("\x1b[H")
        text = pictures[-2] if len(pictures) > 2 else pictures[-1]
        return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split("\r\n")]

    def shows(self, text: str) -> bool:
        return any(text in line for line in self.screen())

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def hang_up(self) -> None:
        os.close(self._theirs)
        os.close(self._ours)
        self._theirs = self._ours = -1

    def end(self) -> int:
        """Wait for the command's end; return its exit status."""

        def ended() -> bool:
            self.read()  # it may have to get rid of its output first
            return self.process.poll() is not None

        wait_until(ended, what="the command to end")
        self.read()
        return self.process.returncode

    def is_restored(self) -> bool:
        """Whether the terminal is as it was."""
        balanced = self.output.count(_ENTER) == self.output.count(_LEAVE) == 1
        shown = self.output.rindex(_SHOW) > self.output.rindex(_HIDE)
        return balanced and shown and termios.tcgetattr(self._theirs) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for fd in (self._ours, self._theirs):
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def top(address: str, *arguments: str, **more: Any) -> Iterator[Terminal]:
    with contextlib.closing(
        Terminal("top", "--broker", address, "--interval", "0.1", *arguments, **more)
    ) as terminal:
        yield terminal


@pytest.fixture
def holder(postgres: EphemeralPostgres, broker: sharedpool.Broker) -> Iterator[Worker]:
    """A process that holds the only connection of the pool `watched`, in a transaction."""
    with Worker(
        dsn=postgres.dsn, broker=broker.address, name="watched", max_conn=1, debug_checkouts=True
    ) as worker:
        worker.ask("get", name="x", timeout=10)
        worker.ask("query", name="x", sql="SELECT 1")
        yield worker


def test_it_shows_who_has_what_and_ends_with_q(
    postgres: EphemeralPostgres, broker: sharedpool.Broker, holder: Worker
) -> None:
    with (
        Worker(dsn=postgres.dsn, broker=broker.address, name="watched", max_conn=1) as waiter,
        top(broker.address) as terminal,
    ):
        waiter.send("get", name="x", timeout=60)

        def complete() -> bool:
            (row,) = [
                line.split() for line in terminal.screen() if line.startswith("watched ")
            ] or [[""]]
            return row[1:6] == ["1", "1", "0", "0", "1"] and terminal.shows("worker.py:")

        wait_until(
            complete, what="limit 1, 1 in use, none idle nor otherwise, 1 waiting; and its line"
        )
        lines = terminal.screen()
        assert len(lines) == 24
        assert max(map(len, lines)) <= 80
        assert lines[0].startswith(f"sharedpool broker {broker.pid}, up ")
        assert lines[0].endswith("q quits")
        (checkout,) = [line for line in lines if f"worker.py[{holder.pid}]" in line]
        assert "idle in transaction" in checkout
        assert re.search(r"worker\.py:\d+ in get", checkout)
        holder.ask("put", name="x")
        assert "backend" in waiter.answer()
        wait_until(
            lambda: terminal.shows(f"worker.py[{waiter.pid}]"), what="the connection's next user"
        )
        assert termios.tcgetattr(terminal._theirs) != terminal.before
        terminal.type("q")
        assert terminal.end() == 0
        assert terminal.is_restored()


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT],
    ids=lambda number: number.name,
)
def test_a_signal_ends_it_and_the_terminal_is_as_before(
    broker: sharedpool.Broker, number: signal.Signals
) -> None:
    with top(broker.address) as terminal:
        wait_until(lambda: terminal.shows("q quits"))
        terminal.process.send_signal(number)
        assert terminal.end() == 128 + number
        assert terminal.is_restored()


def test_ctrl_c_ends_it_and_ctrl_z_does_not_leave_its_screen_behind(
    broker: sharedpool.Broker,
) -> None:
    with top(broker.address) as terminal:
        wait_until(lambda: terminal.shows("q quits"))
        terminal.type("\x1a")
        pictures = terminal.read().count("\x1b[H")
        wait_until(lambda: terminal.read().count("\x1b[H") > pictures + 3, what="it to go on")
        terminal.type("\x03")
        assert terminal.end() == 128 + signal.SIGINT
        assert terminal.is_restored()


def test_it_ends_with_its_terminal(broker: sharedpool.Broker) -> None:
    with top(broker.address) as terminal:
        wait_until(lambda: terminal.shows("q quits"))
        terminal.hang_up()
        wait_until(lambda: terminal.process.poll() is not None, what="the command to end")
        assert terminal.process.returncode == 128 + signal.SIGHUP


def test_it_fits_whatever_size_the_terminal_becomes(
    broker: sharedpool.Broker, holder: Worker
) -> None:
    with top(broker.address, rows=10, columns=40, COLUMNS="80", LINES="24") as terminal:
        wait_until(lambda: terminal.shows("q quits") and len(terminal.screen()) == 10)
        terminal.size(30, 120)
        wait_until(lambda: len(terminal.screen()) == 30)
        terminal.size(2, 10)
        wait_until(lambda: len(terminal.screen()) == 2)
        terminal.type("Q")
        assert terminal.end() == 0
        assert terminal.is_restored()


def test_a_broker_that_is_away_is_told_of_and_its_successor_shown(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    address = f"ipc://{runtime_dir}/b.sock"
    options = ["broker", "--max-conn", "2", "--bind", address, "--dsn", postgres.dsn]
    with start(*options) as first, top(address) as terminal:
        wait_for(first, "enforces")
        wait_until(lambda: terminal.shows(f"sharedpool broker {first.pid}"))
        first.kill()
        first.communicate()
        wait_until(lambda: terminal.shows("no answer for"))
        assert terminal.shows(f"sharedpool broker {first.pid}")  # what was last known
        with start(*options) as second:
            wait_until(lambda: terminal.screen()[0].startswith(f"sharedpool broker {second.pid}"))
            wait_until(lambda: not terminal.shows("no answer for"))
            terminal.type("q")
            assert terminal.end() == 0
            second.terminate()
            second.communicate()


def test_without_a_terminal_it_prints_one_snapshot(
    broker: sharedpool.Broker, holder: Worker
) -> None:
    started = time.monotonic()
    done = sharedpool_command("top", "--broker", broker.address)
    assert done.returncode == 0
    assert time.monotonic() - started < 30
    assert "\x1b" not in done.stdout
    assert done.stdout.count("sharedpool broker") == 1
    assert f"worker.py[{holder.pid}]" in done.stdout
    assert "watched" in done.stdout


def test_without_a_broker_it_says_so_with_3(runtime_dir: Path) -> None:
    done = sharedpool_command("top")
    assert done.returncode == 3
    assert "no broker is running" in done.stderr
    assert sharedpool_command("top", "--broker", f"ipc://{runtime_dir}/nobody.sock").returncode == 3


def test_without_rich_it_says_what_to_install(broker: sharedpool.Broker, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rich'] = None\n")
    with top(
        broker.address, PYTHONPATH=f"{tmp_path}{os.pathsep}{Path(sharedpool.__file__).parents[1]}"
    ) as terminal:
        assert terminal.end() == 1
        assert "pip install 'sharedpool[top]'" in terminal.output
        assert "Traceback" not in terminal.output
        assert _ENTER not in terminal.output


def test_of_several_brokers_one_must_be_chosen(runtime_dir: Path) -> None:
    addresses = [f"ipc://{runtime_dir}/sharedpool/{name}.sock" for name in ("a", "b")]
    (runtime_dir / "sharedpool").mkdir(0o700)
    with (
        start("broker", "--max-conn", "1", "--bind", addresses[0]) as one,
        start("broker", "--max-conn", "1", "--bind", addresses[1]) as other,
    ):
        for process in (one, other):
            wait_for(process, "enforces")
        with contextlib.closing(Terminal("top", columns=200)) as terminal:
            assert terminal.end() == 2
            for address in addresses:
                assert address in terminal.output
        assert sharedpool_command("top").stdout.count("sharedpool broker") == 2
        for process in (one, other):
            process.terminate()
            process.communicate()

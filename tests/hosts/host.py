"""A host of the laboratory: processes, names, folders and network of its own, on one kernel.

`Host` starts one, runs programs on it, and does to it what happens to hosts: it is killed, frozen,
cut off, or loses its power.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import sharedpool
from sharedpool.descriptors.readable import readable
from tests.hosts.network import Cable, Switch
from tests.support.waiting import wait_until

_INIT = Path(__file__).with_name("host_init.py")
_TREE = Path(sharedpool.__file__).resolve().parents[1]
ANSWER_S = 60.0
PRIVATE = ("/tmp", "/dev/shm")  # each host has its own
RUNTIME_DIR = "/tmp/runtime"
# What a program on a real host has of the environment that tests run in: no test's settings.
_ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PATH": os.environ.get("PATH", os.defpath),
    "PYTHONPATH": str(_TREE),
    "TMPDIR": "/tmp",
    "XDG_RUNTIME_DIR": RUNTIME_DIR,
}


@dataclass(slots=True)
class Program:
    """A program on a host. `pid` is its number there; the pipes are the test's ends."""

    pid: int
    stdin: IO[bytes]
    stdout: IO[bytes]
    status: int | None = None

    def close(self) -> None:
        self.stdin.close()
        self.stdout.close()


class Host:
    """One host, running from the start.

    It sees only itself, the network, `directory` and the Python installation.
    """

    def __init__(self, name: str, address: str, switch: Switch, directory: Path) -> None:
        self.name = name
        self.address = address
        self.pid = 0  # of its PID 1, as this machine numbers it
        self._running: dict[int, Program] = {}
        self._programs: list[Program] = []
        self._errors = (directory / f"{name}.stderr").open("ab")
        root = directory / f"{name}-{secrets.token_hex(3)}"
        root.mkdir()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings: dict[str, object] = {"name": name, "root": str(root), "boot": str(uuid.uuid4())}
        settings |= {"private": PRIVATE, "kept": _kept(directory)}
        spaces = ("--pid", "--fork", "--mount", "--uts", "--ipc", "--net", "--mount-proc")
        self._unshare = subprocess.Popen(
            [
                # A frozen host cannot see its socket close: it would outlive tests that are killed.
                *("setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "--kill-child=SIGKILL"),
                *(sys.executable, "-I", str(_INIT), json.dumps(settings)),
            ],
            stdin=theirs.fileno(),
            stdout=self._errors,
            stderr=self._errors,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        theirs.close()
        try:
            self._answer("ready")
            children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
            self.pid = int(children.read_text())
            self._namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
            self.cable: Cable = switch.connect(self.pid, address)
        except BaseException:
            self.close()
            raise

    # --- programs

    def run(self, *command: str) -> Program:
        """Start a program, in a session of its own. Its stderr is the host's."""
        its_stdin, stdin = os.pipe()
        stdout, its_stdout = os.pipe()
        try:
            message = json.dumps({"run": command}).encode()
            pipes = [its_stdin, its_stdout, self._errors.fileno()]
            socket.send_fds(self._control, [message], pipes)
        finally:
            os.close(its_stdin)
            os.close(its_stdout)
        program = Program(0, os.fdopen(stdin, "wb", 0), os.fdopen(stdout, "rb", 0))
        try:
            program.pid = self._answer("started")
        except BaseException:
            program.close()
            raise
        self._running[program.pid] = program
        self._programs.append(program)
        return program

    def output(self, *command: str, timeout_s: float = ANSWER_S) -> str:
        """Run a program to its end; return what it printed. It must succeed."""
        program = self.run(*command)
        program.stdin.close()
        said = b""
        deadline = time.monotonic() + timeout_s
        while readable([program.stdout], max(0.0, deadline - time.monotonic())):
            if not (chunk := os.read(program.stdout.fileno(), 65536)):
                break
            said += chunk
        status = self.wait(program, max(0.0, deadline - time.monotonic()))
        program.close()
        assert status == 0, f"{command} on {self.name} ended with status {status}: {self.errors()}"
        return said.decode()

    def python(self, code: str, *arguments: str, timeout_s: float = ANSWER_S) -> str:
        """Run Python code to its end; return what it printed."""
        return self.output(sys.executable, "-c", code, *arguments, timeout_s=timeout_s)

    def wait(self, program: Program, timeout_s: float = ANSWER_S) -> int:
        """Wait until a program has ended; return its exit status, or minus the signal."""
        deadline = time.monotonic() + timeout_s
        while program.status is None:
            self._read(max(0.0, deadline - time.monotonic()), f"the end of {program.pid}")
        return program.status

    def errors(self) -> str:
        """What the host's programs have written to stderr."""
        return Path(self._errors.name).read_text(errors="replace")

    def _answer(self, word: str) -> int:
        """Wait for the answer that has this word; ends of programs may be told before it."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            message = self._read(max(0.0, deadline - time.monotonic()), f"the word {word!r}")
            assert "error" not in message, f"on {self.name}: {message['error']}"
            if word in message:
                return int(message[word])

    def _read(self, timeout_s: float, what: str) -> dict[str, Any]:
        assert readable([self._control], timeout_s), f"{self.name}: waited in vain for {what}"
        data = self._control.recv(1 << 16)
        assert data, f"{self.name} has ended: {self.errors()}"
        message: dict[str, Any] = json.loads(data)
        if "ended" in message:
            self._running.pop(message["ended"]).status = message["status"]
        return message

    # --- what happens to hosts

    def processes(self) -> dict[int, list[str]]:
        """Return the command lines of all of the host's processes, its PID 1 included.

        The keys are their pids on this machine.
        """
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns/pid") == self._namespace:
                    words = (entry / "cmdline").read_text(errors="replace")
                    found[int(entry.name)] = words.rstrip("\0").split("\0")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                pass  # it has ended, or is another user's
        return found

    def pids_of(self, words: Sequence[str]) -> list[int]:
        """Return the processes whose command line has all of these words."""
        return [pid for pid, line in self.processes().items() if set(words) <= set(line)]

    def kill(self) -> float:
        """Kill all processes at once, wait for their end, and return when they were killed.

        Their sockets are closed by the host's kernel: the others are told.
        """
        at = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait(ANSWER_S)  # PID 1 ends only after all others in its namespace
        return at

    def lose_power(self) -> float:
        """End the host without a word to anybody; return when it was last heard."""
        at = self.cut()
        self.kill()
        return at

    def cut(self) -> float:
        """Cut the network; return when that began."""
        at = time.monotonic()
        self.cable.cut()
        return at

    def freeze(self) -> float:
        """Stop all processes; return when that began."""
        at = time.monotonic()
        stopped: set[int] = set()
        # One that is being stopped may just have made another.
        while new := self.processes().keys() - stopped:
            self._signal(new, signal.SIGSTOP)
            wait_until(lambda new=new: all(map(_is_stopped, new)), 10, "processes to be stopped")
            stopped |= new
        return at

    def thaw(self) -> float:
        """Let the processes go on; return when that began."""
        at = time.monotonic()
        self._signal(self.processes(), signal.SIGCONT)
        return at

    @staticmethod
    def _signal(pids: Any, signum: int) -> None:
        for pid in pids:
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                pass  # it has just ended

    @property
    def is_up(self) -> bool:
        return self._unshare.poll() is None

    def close(self) -> None:
        """End the host, whatever state it is in."""
        if self.is_up and self.pid:
            self.kill()
        self._unshare.kill()  # does nothing if it has ended; else it takes PID 1 with it
        self._unshare.wait(ANSWER_S)
        for program in self._programs:
            program.close()
        self._control.close()
        self._errors.close()


def _is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True  # it has ended
    return state in "TtZX"


def _kept(directory: Path) -> list[str]:
    """Return the folders that a host needs to see, even those in folders that it has its own of."""
    python = (sys.prefix, sys.base_prefix, *sys.path, str(_TREE), str(_INIT.parent))
    folders = {Path(entry).resolve() for entry in python if entry and Path(entry).is_dir()}
    folders |= {directory.resolve()}
    folders -= set(map(Path, PRIVATE))  # in sys.path for a script that lies there
    outermost = [folder for folder in folders if not folders.intersection(folder.parents)]
    return sorted(str(folder) for folder in outermost)

"""Start worker programs as forks of one process that has imported what they import.

A Python that imports sharedpool takes a quarter of a second of CPU, a fork a few milliseconds.
Workers are started so unless a test needs a process that has imported everything itself.

Run as a program, this is the server: it forks for each request that comes in its socket, and
reaps. It ends with the process that has started it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_MAX_BYTES = 65536
_FDS = 3  # stdin, stdout and stderr


class ForkServer:
    """The server of this process, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0  # of the process that has started it
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> int:
        """Send a request; return the answer."""
        with self._lock:
            if self._pid != os.getpid():
                self._start()
            assert self._line is not None
            socket.send_fds(self._line, [json.dumps(request).encode()], fds)
            answer = self._line.recv(_MAX_BYTES)
        assert answer, "the fork server has ended"
        return int(answer)

    def _start(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the tests
            )
        self._pid = os.getpid()
        atexit.register(self._stop)

    def _stop(self) -> None:
        if self._pid == os.getpid() and self._line is not None and self._process is not None:
            self._line.close()
            self._process.wait()


_server = ForkServer()


class ForkedProgram:
    """A program that runs in a fork, with the part of `processes.Piped` that workers need."""

    def __init__(self, program: Path, *arguments: str) -> None:
        self.args = (str(program), *arguments)
        self.returncode: int | None = None
        their_stdin, our_stdin = os.pipe()
        our_stdout, their_stdout = os.pipe()
        self.stdin, self.stdout = os.fdopen(our_stdin, "w"), os.fdopen(our_stdout)
        request = {"argv": self.args, "environment": dict(os.environ), "folder": os.getcwd()}
        try:
            self.pid = _server.ask(request, [their_stdin, their_stdout, 2])
        finally:
            os.close(their_stdin)
            os.close(their_stdout)
        self._end = os.pidfd_open(self.pid)

    def tell(self, line: str) -> None:
        self.stdin.write(f"{line}\n")
        self.stdin.flush()

    def tell_no_more(self) -> None:
        """Close the program's input, which makes most programs end."""
        self.stdin.close()

    def poll(self) -> int | None:
        """Return the exit status; None while the program runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        """Wait for the end; return the exit status. Raise `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._end, select.POLLIN)
            if not poller.poll(None if timeout == math.inf else timeout * 1000):
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = _server.ask({"reap": self.pid})
            os.close(self._end)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


# --- the server


def _serve(line: socket.socket) -> list[str]:
    """Fork at each request; return the program and its arguments in the child."""
    while True:
        packet, fds, _, _ = socket.recv_fds(line, _MAX_BYTES, _FDS)
        if not packet:
            sys.exit()
        request = json.loads(packet)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            line.send(b"%d" % os.waitstatus_to_exitcode(status))
            continue
        _compiled(request["argv"][0])  # once, for all children
        if (pid := os.fork()) == 0:
            line.close()
            _become(request["environment"], request["folder"], fds)
            return list(request["argv"])
        line.send(b"%d" % pid)
        for fd in fds:
            os.close(fd)


@functools.cache
def _compiled(program: str) -> CodeType:
    return compile(Path(program).read_bytes(), program, "exec")


def _become(environment: dict[str, str], folder: str, fds: list[int]) -> None:
    """Take over the environment, folder and standard files of a request."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)


def main() -> None:
    import psycopg2  # noqa: F401 # what the children need

    import sharedpool  # noqa: F401

    sys.argv = _serve(socket.socket(fileno=int(sys.argv[1])))
    program = sys.argv[0]
    sys.path[0] = str(Path(program).parent)
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = program
    exec(_compiled(program), module.__dict__)  # it is a file of the tests


if __name__ == "__main__":
    main()

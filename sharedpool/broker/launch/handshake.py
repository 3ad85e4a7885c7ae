"""Start one program as a detached broker, and follow its start over its pipes.

1. The program prints a greeting with its version (`interpreter.GREETING`), so that nothing is sent
   to a program that is no Python with this sharedpool.
2. It is sent the settings on its standard input.
3. It answers with one line: "ready", "already running", or an error. The broker itself is a child
   of that process, which then ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO

from sharedpool.broker.launch import interpreter
from sharedpool.broker.settings import BrokerSettings
from sharedpool.descriptors.readable import readable

# How long a broker may take from its start to its first message, on a busy machine.
START_LIMIT_S = 20.0


class NotPython(Exception):
    """A program is no Python with this sharedpool; the text is what it has shown instead."""


def start_program(program: str, settings: BrokerSettings, log: Path, deadline: float) -> str:
    """Start a broker with `program`, and return its answer. Raise `NotPython`."""
    command = [program, "-P", "-m", "sharedpool.broker", str(log)]
    with open(log, "ab+", opener=_open_log) as errors:
        before = os.fstat(errors.fileno()).st_size
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=interpreter.environment(),
                start_new_session=True,
            )
        except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
            raise NotPython(error.strerror) from None
        assert process.stdin is not None
        assert process.stdout is not None
        lines = _Lines(process.stdout.fileno(), deadline)
        answer: str | None = None
        with process.stdin, process.stdout:
            try:
                greeting = lines.next_with(interpreter.GREETING, lambda: process.poll() is not None)
                if greeting is None:
                    status = process.wait()
                    raise NotPython(_last_line(errors.fileno(), before) or f"status {status}")
                if greeting != interpreter.greeting():
                    raise NotPython(f"it has {greeting}, not {interpreter.greeting()}")
                _send(process.stdin, settings)
                answer = lines.next()
            except TimeoutError as error:
                process.kill()
                answer = str(error)
            except BrokenPipeError:
                pass  # it has ended: its status tells
    process.wait()
    return answer or f"it ended with status {process.returncode}; see {log}"


def _send(pipe: IO[bytes], settings: BrokerSettings) -> None:
    """Send the settings: by a pipe, as they contain the password and everybody can read argv.

    In one line, because the pipe's end may not be seen: a child forked meanwhile has a copy of it.
    """
    pipe.write(json.dumps(asdict(settings)).encode() + b"\n")
    pipe.flush()


def _last_line(fd: int, offset: int) -> str:
    """Return the last line that was written to a file after `offset`; empty if there is none."""
    lines = os.pread(fd, 65536, offset).decode("utf-8", "replace").split("\n")
    return next(filter(None, map(str.strip, reversed(lines))), "")


def _open_log(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


class _Lines:
    """The lines that come through a pipe until `deadline`."""

    def __init__(self, fd: int, deadline: float) -> None:
        self._fd = fd
        self._deadline = deadline
        self._read = b""

    def next(self, ended: Callable[[], bool] = lambda: False) -> str | None:
        """Return the next line, None at the end; raise `TimeoutError` at the deadline.

        `ended` returns True if the writer has ended. The pipe does not show that while a child
        forked meanwhile has a copy of its other end.
        """
        while b"\n" not in self._read:
            if time.monotonic() >= self._deadline:
                raise TimeoutError(f"it did not answer within {START_LIMIT_S:.0f} s")
            # Asked before the pipe is read: then all that was written is in the pipe by now.
            over = ended()
            if not readable([self._fd], 0.1):
                if over:
                    return None
                continue
            chunk = os.read(self._fd, 4096)
            if not chunk:
                return None
            self._read += chunk
        line, self._read = self._read.split(b"\n", 1)
        return line.decode("utf-8", "replace").strip()

    def next_with(self, beginning: str, ended: Callable[[], bool]) -> str | None:
        """Return the next line that begins so; a user's `sitecustomize` may print others first."""
        while (line := self.next(ended)) is not None and not line.startswith(beginning):
            pass
        return line

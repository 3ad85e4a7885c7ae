"""See to it that a broker runs that nobody owns: detached, found by its address, started by whoever needs it first.

A worker imports this: nothing here may load the server and what it needs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sharedpool.broker.launch import interpreter
from sharedpool.broker.settings import OPTIONS, BrokerSettings
from sharedpool.descriptors.readable import readable
from sharedpool.discovery import address as addresses
from sharedpool.discovery.lock_file import is_held
from sharedpool.errors import BrokerUnavailable, ConfigError, SharedPoolError
from sharedpool.validate import parse_seconds

# How long a broker may take from its start to its first message, on a busy machine.
START_LIMIT_S = 20.0
DEFAULT_LINGER_S = 30.0
_NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def ensure_running(address: str, settings: Callable[[], BrokerSettings]) -> None:
    """Make sure that a broker lives at `address`: return when one does, starting it with `settings()` when none does.

    Blocks up to `START_LIMIT_S`. Of many processes that call this at once exactly one starts a broker. Raise
    `BrokerUnavailable` when it does not come up, with its own words.
    """
    addresses.runtime_dir()  # somebody may have cleaned the temporary directory
    lock = addresses.lock_path(address)
    with _explained(address):
        if is_held(lock):
            return
    try:
        found = settings()
    except SharedPoolError:
        raise
    except Exception as error:  # a user's function, asked for the password
        text = f"the automatic broker at {address} was not started: {type(error).__name__}: {error}"
        raise BrokerUnavailable(text) from error
    deadline = time.monotonic() + START_LIMIT_S
    with _explained(address), _start_lock(lock.with_suffix(".start"), deadline):
        if not is_held(lock):
            _start_detached(found, deadline)


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Have an error of the files beside `address` say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        text = (
            f"the automatic broker at {address} was not started: {error.filename}: {error.strerror}"
        )
        raise BrokerUnavailable(
            f"{text}; set XDG_RUNTIME_DIR or TMPDIR, or {interpreter.ADVICE}"
        ) from None


@contextlib.contextmanager
def _start_lock(path: Path, deadline: float) -> Any:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BrokerUnavailable(
                        f"another process has held {path} for {START_LIMIT_S:.0f} s"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        fcntl.flock(
            fd, fcntl.LOCK_UN
        )  # a child forked meanwhile has a copy: closing ours would not unlock
        os.close(fd)


def _start_detached(settings: BrokerSettings, deadline: float) -> None:
    """Start a broker by the first Python that has this sharedpool; raise `BrokerUnavailable` with what went wrong."""
    log = addresses.lock_path(settings.address).with_suffix(".log")
    tried = []
    for program in interpreter.candidates():
        try:
            word = _start(program, settings, log, deadline)
        except _NoPython as error:
            tried.append(f"{program}: {error}")
            continue
        if word not in ("ready", "already running"):
            raise BrokerUnavailable(
                f"the automatic broker at {settings.address} did not start: {word}"
            )
        return
    raise BrokerUnavailable(
        f"the automatic broker at {settings.address} was not started: {interpreter.none_found(tried)}"
    )


class _NoPython(Exception):
    """A program is no Python with this sharedpool; the text is what it has shown instead."""


def _start(program: str, settings: BrokerSettings, log: Path, deadline: float) -> str:
    """Start a broker by `program` and return its word. It is told nothing until it has greeted: see `interpreter`."""
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
            raise _NoPython(error.strerror) from None
        assert process.stdin is not None
        assert process.stdout is not None
        lines = _Lines(process.stdout.fileno(), deadline)
        with process.stdin, process.stdout:
            try:
                greeting = lines.next_with(interpreter.GREETING, lambda: process.poll() is not None)
                if greeting is None:
                    process.wait()
                    said = (
                        os.pread(errors.fileno(), 65536, before)
                        .decode("utf-8", "replace")
                        .split("\n")
                    )
                    raise _NoPython(
                        next(
                            filter(None, map(str.strip, reversed(said))),
                            f"status {process.returncode}",
                        )
                    )
                if greeting != interpreter.greeting():
                    raise _NoPython(f"it has {greeting}, not {interpreter.greeting()}")
                # The settings, password included, go through a pipe: argv is public. In one line: a child forked
                # meanwhile has a copy of this pipe, so its end would not be seen.
                process.stdin.write(json.dumps(asdict(settings)).encode() + b"\n")
                process.stdin.flush()
                word = lines.next()
            except TimeoutError as error:
                process.kill()
                word = str(error)
            except BrokenPipeError:
                word = None
    process.wait()  # the broker itself is its grandchild
    return word or f"it ended with status {process.returncode}; see {log}"


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

        `ended` tells that nobody writes any more, which a pipe does not show while a child forked meanwhile has it too.
        """
        while b"\n" not in self._read:
            if time.monotonic() >= self._deadline:
                raise TimeoutError(f"no word from it in {START_LIMIT_S:.0f} s")
            over = ended()  # asked first: what it wrote before its end is there by now
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
        """Return the next line that begins so; a user's `sitecustomize` may print what it likes before it."""
        while (line := self.next(ended)) is not None and not line.startswith(beginning):
            pass
        return line


def with_linger(settings: BrokerSettings) -> BrokerSettings:
    """Return the settings of an automatic broker: `settings` with those from the environment.

    Without SHAREDPOOL_LINGER the broker lingers for `DEFAULT_LINGER_S`. Raise `ConfigError`.
    """
    found: dict[str, Any] = {"linger_s": DEFAULT_LINGER_S}
    for option in OPTIONS:
        if option.automatic and (text := os.environ.get(option.variable)):
            try:
                found[option.field] = parse_seconds(text)
            except ValueError as error:
                raise ConfigError(f"{option.variable}: {error}") from None
    return replace(settings, **found)

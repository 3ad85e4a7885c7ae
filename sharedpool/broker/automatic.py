"""See to it that a broker runs that nobody owns: detached, found by its address, started by whoever needs it first.

A worker imports this: nothing here may load the server and what it needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sharedpool.broker.lock import is_held
from sharedpool.broker.settings import BrokerSettings
from sharedpool.errors import BrokerUnavailable, ConfigError, SharedPoolError
from sharedpool.readable import readable
from sharedpool.wire import address as addresses

# How long a broker may take from its start to its first message, on a busy machine.
START_LIMIT_S = 20.0
DEFAULT_LINGER_S = 30.0


def ensure_running(address: str, settings: Callable[[], BrokerSettings]) -> None:
    """Make sure that a broker lives at `address`: return when one does, starting it with `settings()` when none does.

    Blocks up to `START_LIMIT_S`. Of many processes that call this at once exactly one starts a broker. Raise
    `BrokerUnavailable` when it does not come up, with its own words.
    """
    addresses.runtime_dir()  # somebody may have cleaned the temporary directory
    lock = addresses.lock_path(address)
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
    with _start_lock(lock.with_suffix(".start"), deadline):
        if not is_held(lock):
            _start_detached(found, deadline)


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
                    raise BrokerUnavailable(f"another process has held {path} for {START_LIMIT_S:.0f} s") from None
                time.sleep(0.02)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked meanwhile has a copy: closing ours would not unlock
        os.close(fd)


def _start_detached(settings: BrokerSettings, deadline: float) -> None:
    # The settings, password included, go through a pipe: argv is public.
    if not sys.executable:
        raise BrokerUnavailable(
            "sys.executable is not set: start `sharedpool broker` yourself and give broker= its address"
        )
    log = addresses.lock_path(settings.address).with_suffix(".log")
    package_parent = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, (package_parent, os.getenv("PYTHONPATH")))))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "sharedpool.broker", str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            # One line: a child forked meanwhile has a copy of this pipe, so its end would not be seen.
            process.stdin.write(json.dumps(asdict(settings)).encode() + b"\n")
            process.stdin.flush()
            word = _read_line(process.stdout.fileno(), deadline)
        except BrokenPipeError:
            word = ""
    if word.startswith("no word"):
        process.kill()
    process.wait()  # the broker itself is its grandchild
    if word not in ("ready", "already running"):
        detail = word or f"it ended with status {process.returncode}; see {log}"
        raise BrokerUnavailable(f"the automatic broker at {settings.address} did not start: {detail}")


def _read_line(fd: int, deadline: float) -> str:
    data = b""
    while b"\n" not in data:
        left = deadline - time.monotonic()
        if left <= 0 or not readable([fd], left):
            return f"no word from it in {START_LIMIT_S:.0f} s"
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        data += chunk
    return data.decode("utf-8", "replace").strip()


def with_linger(settings: BrokerSettings) -> BrokerSettings:
    """Return `settings` for an automatic broker, with TTL and linger from SHAREDPOOL_TTL and SHAREDPOOL_LINGER."""
    return replace(
        settings,
        ttl_s=_seconds("SHAREDPOOL_TTL", settings.ttl_s),
        linger_s=_seconds("SHAREDPOOL_LINGER", DEFAULT_LINGER_S),
    )


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ConfigError(f"{name}: {text!r} is not a positive number of seconds")
    return value

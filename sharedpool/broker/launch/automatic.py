"""The automatic broker: detached, found by its address, and started by the worker that needs it.

A worker imports this module, so nothing here may load the server and what it needs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharedpool.broker.launch import interpreter
from sharedpool.broker.launch.handshake import START_LIMIT_S, NotPython, start_program
from sharedpool.broker.settings import OPTIONS, BrokerSettings
from sharedpool.discovery import address as addresses
from sharedpool.discovery.lock_file import is_held
from sharedpool.errors import BrokerUnavailable, ConfigError, SharedPoolError
from sharedpool.validate import parse_seconds

DEFAULT_LINGER_S = 30.0
_NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def ensure_running(address: str, settings: Callable[[], BrokerSettings]) -> None:
    """Return when a broker runs at `address`; start one with `settings()` if none does.

    Blocks up to `START_LIMIT_S`. Of many processes that call this at once exactly one starts a
    broker. Raise `BrokerUnavailable`, with the broker's own error, if it does not start.
    """
    addresses.runtime_dir()  # made again if a cleaner of temporary directories has deleted it
    lock = addresses.lock_path(address)
    with _explained(address):
        if is_held(lock):
            return
    try:
        found = settings()
    except SharedPoolError:
        raise
    except Exception as error:  # from a user's function that returns the password
        text = f"the automatic broker at {address} was not started: {type(error).__name__}: {error}"
        raise BrokerUnavailable(text) from error
    deadline = time.monotonic() + START_LIMIT_S
    with _explained(address), _start_lock(lock.with_suffix(".start"), deadline):
        if not is_held(lock):
            _start_detached(found, deadline)


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn an error of the files beside `address` into one that says what to do."""
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
        # A child forked meanwhile has a copy of the descriptor: closing ours would not unlock.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _start_detached(settings: BrokerSettings, deadline: float) -> None:
    """Start a broker with the first Python that has this sharedpool; raise `BrokerUnavailable`."""
    log = addresses.lock_path(settings.address).with_suffix(".log")
    tried = []
    for program in interpreter.candidates():
        try:
            answer = start_program(program, settings, log, deadline)
        except NotPython as error:
            tried.append(f"{program}: {error}")
            continue
        if answer not in ("ready", "already running"):
            raise BrokerUnavailable(
                f"the automatic broker at {settings.address} did not start: {answer}"
            )
        return
    text = f"the automatic broker at {settings.address} was not started"
    raise BrokerUnavailable(f"{text}: {interpreter.none_found(tried)}")


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

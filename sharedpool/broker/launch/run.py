"""Run a broker: in this process, as a child that a script owns, or detached and shared.

`serve` is the first way, `start_broker` the second. `run_detached` is the main program of the
automatic broker, which `automatic.py` starts.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import multiprocess

from sharedpool.broker.launch import interpreter
from sharedpool.broker.launch.handshake import START_LIMIT_S
from sharedpool.broker.server.server import Server
from sharedpool.broker.settings import DEFAULT_TTL_S, BrokerSettings
from sharedpool.discovery import address as addresses
from sharedpool.discovery.lock_file import AlreadyRunning
from sharedpool.errors import BrokerUnavailable, ConfigError, SharedPoolError
from sharedpool.postgres.conninfo import resolve
from sharedpool.validate import check_number

_LOG_KEPT_BYTES = 1 << 20


def serve(server: Server, *, reloads: bool = False) -> None:
    """Run a server in the main thread until SIGTERM or SIGINT has drained it.

    A second signal stops it at once. A signal that the parent has set to be ignored stays ignored,
    as a shell does with SIGINT. `reloads`: SIGHUP has the settings read again.
    """
    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        previous[number] = signal.signal(number, lambda *_: server.drain())
    if reloads:
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: server.reload())
    try:
        server.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- automatic (`automatic.py`)


def run_detached(log: str) -> None:
    """Run the automatic broker; does not return. For the other side see `handshake.py`."""
    # The starter may have blocked signals, or may ignore them: uWSGI's master ignores SIGTERM while
    # it loads the application.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    print(interpreter.greeting(), flush=True)
    if not (line := sys.stdin.readline()):
        os._exit(0)  # the starter wants another Python
    settings = BrokerSettings(**json.loads(line))
    if os.fork():
        os._exit(0)  # the broker is an orphan: no application has to wait for it
    os.chdir("/")
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.dup2(fd, 2)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    server: Server | None = None
    try:
        server = Server(settings)
    except AlreadyRunning:
        answer = "already running"
    except SharedPoolError as error:
        answer = str(error)
    else:
        answer = "ready"
        if os.fstat(fd).st_size > _LOG_KEPT_BYTES:
            os.ftruncate(fd, 0)
    print(answer, flush=True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if server is not None:
        serve(server)
    os._exit(0)


# --- owned by a script


class Broker:
    """A broker process that this process owns.

    It ends with `stop`, with the `with` block, or with its owner. Workers need its `address`: as
    `config_pool(broker=...)`, or in the environment variable SHAREDPOOL_BROKER.
    """

    def __init__(self, process: Any, address: str) -> None:
        self._process = process
        self._owner = os.getpid()
        self.address = address

    @property
    def pid(self) -> int:
        """The broker's process id."""
        return int(self._process.pid)

    @property
    def is_alive(self) -> bool:
        """Whether the broker process is running."""
        return bool(self._process.is_alive())

    def stop(self) -> None:
        """Stop the broker, and wait for it (at most 5 s). Connections of the workers stay open."""
        if os.getpid() != self._owner:
            return  # a forked child that leaves its parent's `with` block
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(5.0)
            if self._process.is_alive():
                self._process.kill()
        self._process.join()

    def __enter__(self) -> Broker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Broker {self.address} pid={self.pid} {'running' if self.is_alive else 'stopped'}>"


def start_broker(
    max_conn: int,
    *,
    address: str | None = None,
    dsn: str | None = None,
    expiration: float | None = None,
    max_checkout: float | None = None,
    ttl: float = DEFAULT_TTL_S,
) -> Broker:
    """Start a broker process for this script's workers and return its handle (a context manager).

    `max_conn` caps the sum over all pools. With `dsn` (default: DATABASE_DSN, DATABASE_URL, libpq's
    environment) the broker holds one more connection, with which it confirms that dead workers'
    backends are gone. `expiration`, `max_checkout` and `ttl` are seconds. Blocks until the broker
    is ready.

    The broker is a spawned `multiprocess` process: call this under `if __name__ == "__main__":`, as
    with multiprocessing. Raise `BrokerUnavailable` if it does not start, `ConfigError` for a wrong
    argument.
    """
    check_number("max_conn", max_conn, least=1, whole=True)
    for argument, value in (
        ("expiration", expiration),
        ("max_checkout", max_checkout),
        ("ttl", ttl),
    ):
        if value is not None:
            check_number(argument, value, above=True)
    one_off = address is None
    if address is None:
        address = f"ipc://{addresses.runtime_dir()}/broker-{os.getpid()}-{os.urandom(4).hex()}.sock"
    settings = BrokerSettings(
        addresses.check_address(address, "address"),
        max_conn,
        control_dsn(dsn),
        expiration_s=expiration,
        max_checkout_s=max_checkout or 0.0,
        ttl_s=ttl,
        one_off=one_off,
    )
    programs = interpreter.candidates()
    if not programs:
        raise BrokerUnavailable(
            f"the broker at {address} was not started: {interpreter.none_found([])}"
        )
    context = multiprocess.get_context("spawn")
    if sys.executable not in programs:  # the default, which may be no Python
        context.set_executable(programs[0])
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_run_owned, args=(settings, theirs), name="sharedpool-broker", daemon=True
    )
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(START_LIMIT_S) else "it did not answer"
    except EOFError:
        answer = (
            "it ended at once: is start_broker() called under `if __name__ == '__main__':`,"
            " in a script that is a file?"
        )
    if answer != "ready":
        process.kill()
        process.join()
        raise BrokerUnavailable(f"the broker at {address} did not start: {answer}")
    return Broker(_Owned(process, ours), address)


class _Owned:
    """The process, and the pipe whose closing tells the broker that its owner has ended."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)


def _run_owned(settings: BrokerSettings, pipe: Connection) -> None:
    # Ctrl-C reaches the whole process group; the owner decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        server = Server(settings)
    except SharedPoolError as error:
        pipe.send(str(error))
        return
    pipe.send("ready")
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.stop_when_closed(pipe.fileno())
    server.run()


def control_dsn(dsn: str | None) -> str | None:
    """Return the conninfo for a control connection: of `dsn`, or of the environment, or None."""
    if dsn is not None:
        return resolve(dsn=dsn).dsn
    try:
        return resolve().dsn
    except ConfigError:
        if any(name in os.environ for name in ("DATABASE_DSN", "DATABASE_URL")):
            raise
        return None

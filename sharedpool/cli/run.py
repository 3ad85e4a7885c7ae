"""`sharedpool run`: a broker for the life of one command.

The main thread runs the command and passes signals on to it, the broker runs in a second thread.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any

import click

from sharedpool.broker.server.server import Server
from sharedpool.cli.logs import log_option, log_to_stderr
from sharedpool.cli.options import broker_options, settings_from
from sharedpool.discovery.address import BROKER_VARIABLE, runtime_dir
from sharedpool.errors import ConfigError, SharedPoolError

_FORWARDED = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGWINCH,
}
_IGNORED_BY_PYTHON = [signal.SIGPIPE, signal.SIGXFSZ]
# How often to look for the end of the command, in case its SIGCHLD was lost.
_POLL_EVERY_S = 5.0
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # a shell's exit statuses


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@broker_options(run=True)
@log_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    log_format: str,
    command: tuple[str, ...],
    **given: Any,
) -> None:
    """Start a broker, run COMMAND with SHAREDPOOL_BROKER set, and end when it ends.

    Example: sharedpool run --max-conn 20 -- gunicorn app:app

    Signals are passed on to the command. The exit status is the command's: 128 + N if signal N
    ended it, 127 if it was not found.
    """
    log_to_stderr(log_format)
    try:
        address = f"ipc://{runtime_dir()}/run-{os.getpid()}.sock"
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    settings = settings_from(given, address, "run", one_off=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # with SIG_IGN a child's status would be lost
    # Blocked before any other thread starts (libzmq's too): a signal must not go to one of those.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
    try:
        server = Server(settings)
    except SharedPoolError as error:
        raise click.ClickException(str(error)) from None
    thread = threading.Thread(target=server.run, name="sharedpool-broker")
    try:
        pid = _spawn(command, address, unblocked)
        thread.start()
        status = _forward_signals(pid)
    finally:
        server.stop()
        if thread.ident is not None:
            thread.join()
        else:
            server.run()  # it is stopped already, so this only unbinds and unlocks
    sys.exit(status)


def _spawn(command: tuple[str, ...], address: str, unblocked: Iterable[int]) -> int:
    environment = dict(os.environ, **{BROKER_VARIABLE: address})
    try:
        # posix_spawn sets the child's signal mask without running Python between fork and exec.
        return os.posix_spawnp(
            command[0], command, environment, setsigmask=unblocked, setsigdef=_IGNORED_BY_PYTHON
        )
    except FileNotFoundError:
        click.echo(f"Error: command not found: {command[0]}", err=True)
        sys.exit(_NOT_FOUND)
    except OSError as error:
        click.echo(f"Error: cannot run {command[0]}: {error.strerror}", err=True)
        sys.exit(_NOT_EXECUTABLE)


def _forward_signals(pid: int) -> int:
    """Pass signals on to the command until it ends. Return its exit status."""
    while True:
        if (status := _reap(pid)) is not None:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        number, from_terminal = _next_signal()
        # The terminal sends a signal to the whole process group, so the command has it already.
        if number in _FORWARDED and not from_terminal:
            os.kill(pid, number)


def _reap(pid: int) -> int | None:
    """Reap all children that have ended. Return the command's wait status if it is one of them.

    As PID 1 of a container, this process also becomes the parent of orphans.
    """
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == pid:
            return status
        if not ended:
            return None


def _next_signal() -> tuple[int, bool]:
    """Wait for a signal. Return its number, and True if the terminal has sent it.

    The number is 0 if none has come within `_POLL_EVERY_S`.
    """
    if hasattr(signal, "sigtimedwait"):
        info = signal.sigtimedwait(_FORWARDED | {signal.SIGCHLD}, _POLL_EVERY_S)
        return (0, False) if info is None else (info.si_signo, info.si_code > 0)
    number = signal.sigwait(_FORWARDED | {signal.SIGCHLD})
    return number, number in (signal.SIGINT, signal.SIGQUIT) and sys.stdin.isatty()

"""`sharedpool top`: a live view of one broker."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import termios
import time
from collections.abc import Iterator

import click

from sharedpool.cli.client import broker_option, find_brokers, from_each
from sharedpool.cli.options import SECONDS
from sharedpool.cli.top_view import picture
from sharedpool.cli.who import Answer, fetch_leases
from sharedpool.descriptors.readable import readable
from sharedpool.errors import BrokerUnavailable

_OLDEST = 100  # leases to ask for: more than a terminal has rows
_ANSWER_LIMIT_S, _ACTIVITY_LIMIT_S = 1.0, 0.3
_SNAPSHOT_SIZE = (160, 60)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@click.command()
@broker_option
@click.option(
    "--interval",
    type=SECONDS,
    default=1.0,
    show_default=True,
    help="Time between two updates.",
)
def top(address: str | None, interval: float) -> None:
    """Watch a broker: limits, use, waiters and their waits, the oldest checkouts. q quits.

    The waits (P50, P99) are those of the last 500 requests: as the broker served them or, while
    processes pass connections among themselves, as the processes report them. A checkout from a
    process's own cache does not count. The chart shows use over the last ten minutes.

    If stdout is not a terminal, one snapshot is printed. Exit status 3 when no broker answers.
    """
    found = find_brokers(address)
    if not found or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        for answer in from_each(found, lambda each: fetch_leases(each, _OLDEST)):
            for line in picture(answer, "", *_SNAPSHOT_SIZE):
                click.echo(line.text.rstrip())
        return
    if len(found) > 1:
        raise click.UsageError(
            f"several brokers are running: give --broker one of {', '.join(found)}"
        )
    if importlib.util.find_spec("rich") is None:
        raise click.ClickException(
            "the live view needs rich: pip install 'sharedpool[top]'"
            " (a snapshot does not: sharedpool top | cat)"
        )
    _Screen(found[0], interval).run()


class _Screen:
    """The live view. The terminal is restored however the view ends."""

    def __init__(self, address: str, interval_s: float) -> None:
        self._address = address
        self._interval_s = interval_s
        self._answer: Answer | None = None
        self._answered_at = time.monotonic()
        self._ended_by = 0  # the number of the signal that ends the view

    def run(self) -> None:
        """Show the broker until the user quits, or until signal N: then exit with 128 + N."""
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        # Where a shell exports these, rich would not see the terminal change its size.
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)
        console = Console()
        unicode = console.encoding.lower().startswith("utf")
        # No refresh thread: it could still draw while the terminal is being restored.
        live = Live(
            console=console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        try:
            with self._signals() as woken, _keys() as keys, live:
                while not self._ended_by:
                    trouble = self._ask()
                    lines = picture(
                        self._answer, trouble, *console.size, hint="q quits", unicode=unicode
                    )
                    view = Text("\n").join(
                        Text(line.text, line.style, no_wrap=True) for line in lines
                    )
                    live.update(view, refresh=True)
                    if self._quits(woken, keys):
                        break
        except (OSError, termios.error):
            if self._ended_by != signal.SIGHUP:
                raise
            # The terminal is gone: there is nothing to restore.
        if self._ended_by:
            sys.exit(128 + self._ended_by)

    def _ask(self) -> str:
        """Ask the broker. Return an error text, or an empty one."""
        try:
            self._answer = fetch_leases(self._address, _OLDEST, _ANSWER_LIMIT_S, _ACTIVITY_LIMIT_S)
        except BrokerUnavailable as error:
            return f"no answer for {time.monotonic() - self._answered_at:.0f} s: {error}"
        self._answered_at = time.monotonic()
        return ""

    def _quits(self, woken: int, keys: int | None) -> bool:
        """Wait for the next update. Return True if the view is to end instead.

        `woken` is readable after a signal. `keys` is the terminal, or None.
        """
        due = time.monotonic() + self._interval_s
        watched = [woken] if keys is None else [woken, keys]
        while not self._ended_by and (left_s := due - time.monotonic()) > 0:
            ready = readable(watched, left_s)
            if woken in ready:
                os.read(woken, 4096)
            if keys is not None and keys in ready:
                typed = os.read(keys, 4096)
                if not typed or b"q" in typed.lower():  # an end of file: the terminal is gone
                    return True
        return bool(self._ended_by)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[int]:
        """Record signals instead of ending by them, so that the terminal is restored first.

        Yield a descriptor that is readable once a signal has come.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        previous = {number: signal.signal(number, self._note) for number in _ENDING}
        wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        try:
            yield read_end
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(read_end)
            os.close(write_end)

    def _note(self, number: int, _: object) -> None:
        self._ended_by = number


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """Have the terminal deliver each key at once, without echo. Yield its descriptor.

    Yield None if stdin is not a terminal. Ctrl-Z is disabled: a stopped process would leave its
    screen behind.
    """
    fd = sys.stdin.fileno()
    if not os.isatty(fd):
        yield None
        return
    before = termios.tcgetattr(fd)
    during = termios.tcgetattr(fd)
    during[3] &= ~(termios.ICANON | termios.ECHO)
    during[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(fd, termios.TCSADRAIN, during)
    try:
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)

"""The worker's logger. Records of the link's thread reach the handlers in another thread.

Handlers are the application's. A handler that writes to the database by this very pool would wait
for the link, in the link's thread. So the link's thread only queues its records (`kept`), and a
thread that lives as long as there are any passes them to the logger. All other threads log as
usual.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from sharedpool.worker import greenlets

_MOST = 1000  # queued records: a handler that hangs must not fill the memory
_EXIT_LIMIT_S = 2.0  # for the handlers, when the interpreter ends


class _Record(NamedTuple):
    """A queued record.

    Not a `LogRecord`: the application's record factory runs in the same thread as its handlers.
    """

    level: int
    text: str
    args: tuple[object, ...]
    exc_info: Any
    caller: tuple[str, int, str]
    thread: int
    thread_name: str
    created: float


class Logs:
    """A logger with the methods that the worker uses."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self._start_afresh()
        atexit.register(self.flush, _EXIT_LIMIT_S)
        os.register_at_fork(after_in_child=self._start_afresh)

    def _start_afresh(self) -> None:
        """Drop the parent's queue and locks, in a forked child: their threads do not exist here."""
        self._pid = os.getpid()
        self._kept: set[int] = set()
        self._queue: deque[_Record] = deque()
        self._left_out = 0
        self._draining = threading.Lock()
        self._drainer: Any = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Queue this thread's (or greenlet's) records until the block ends."""
        if self._pid != os.getpid():
            self._start_afresh()  # after a fork that ran no hooks (uWSGI)
        me, kept = threading.get_ident(), self._kept  # under gevent a greenlet's, as patched
        kept.add(me)
        try:
            yield
        finally:
            kept.discard(me)

    @property
    def is_kept(self) -> bool:
        """Whether this thread's records are queued: it must not wait for the link."""
        return bool(self._kept) and self._pid == os.getpid() and threading.get_ident() in self._kept

    def debug(self, text: str, *args: object) -> None:
        """Log a message, as `logging` does."""
        self._log(logging.DEBUG, text, args)

    def info(self, text: str, *args: object) -> None:
        """Log a message, as `logging` does."""
        self._log(logging.INFO, text, args)

    def warning(self, text: str, *args: object) -> None:
        """Log a message, as `logging` does."""
        self._log(logging.WARNING, text, args)

    def exception(self, text: str, *args: object) -> None:
        """Log a message with the current exception, as `logging` does."""
        self._log(logging.ERROR, text, args, sys.exc_info())

    def _log(self, level: int, text: str, args: tuple[object, ...], exc_info: Any = None) -> None:
        """Log or queue a record.

        Only the methods above call this: the record names the caller of its caller.
        """
        if not self._logger.isEnabledFor(level):
            return
        if not self.is_kept:
            self._logger.log(level, text, *args, exc_info=exc_info, stacklevel=3)
            return
        if len(self._queue) >= _MOST:
            self._left_out += 1
            return
        caller = sys._getframe(2)
        place = (caller.f_code.co_filename, caller.f_lineno, caller.f_code.co_name)
        me = threading.current_thread()
        self._queue.append(
            _Record(level, text, args, exc_info, place, me.ident or 0, me.name, time.time())
        )
        if not self._draining.locked():
            try:
                greenlets.start_thread(self._drain, "sharedpool-logs")
            except RuntimeError:
                pass  # no thread can be started: `flush`, or the next record, passes these on

    def _drain(self) -> None:
        self._drainer = greenlets.current_thread()
        while self._queue and self._draining.acquire(blocking=False):
            try:
                self._emit()
            finally:
                self._draining.release()
            # Look again: a record that came before the release found the lock taken.

    def _emit(self) -> None:
        while self._queue:
            self._hand_over(self._queue.popleft())
            if self._left_out and not self._queue:
                left_out, self._left_out = self._left_out, 0
                self._logger.warning(
                    "%d log records were dropped: the log handlers are too slow", left_out
                )

    def _hand_over(self, kept: _Record) -> None:
        path, line, function = kept.caller
        record = self._logger.makeRecord(
            self._logger.name, kept.level, path, line, kept.text, kept.args, kept.exc_info, function
        )
        record.created, record.thread, record.threadName = (
            kept.created,
            kept.thread,
            kept.thread_name,
        )
        record.msecs = int(kept.created % 1 * 1000) + 0.0
        try:
            self._logger.handle(record)
        except Exception:  # a handler's: the other records are passed on all the same
            kind, error, trace = sys.exc_info()
            threading.excepthook(
                threading.ExceptHookArgs((kind, error, trace, threading.current_thread()))
            )

    def flush(self, limit_s: float) -> None:
        """Return once all queued records are with the handlers, and the thread has ended.

        Wait at most `limit_s` seconds.
        """
        if self._pid != os.getpid() or self.is_kept:
            return
        deadline = time.monotonic() + limit_s
        while self._queue or self._draining.locked():
            if not self._draining.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return
            try:
                self._emit()
            finally:
                self._draining.release()
        drainer = self._drainer
        if isinstance(drainer, threading.Thread) and drainer is not threading.current_thread():
            drainer.join(max(0.0, deadline - time.monotonic()))


logger = Logs("sharedpool.worker")

"""Under gevent's monkey-patching: threads are greenlets, and nothing may block the one thread that they share.

Locks, sleeps and sockets are patched as they are: what is here does what they cannot. Looked at when it is needed, not
at import: a gunicorn worker is patched after its fork, and may have this package from its parent.
"""

from __future__ import annotations

import contextlib
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import psycopg2
import zmq
from psycopg2 import extensions
from zmq import backend

from sharedpool.postgres import libpq

_STEP_S = 0.001
_EVENTS = {extensions.POLL_READ: select.POLLIN, extensions.POLL_WRITE: select.POLLOUT}


def patched(module: str = "threading") -> bool:
    """Say whether gevent has patched a module of the standard library in this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched(module))


def is_eventlets() -> bool:
    """Say whether eventlet has patched this process: its greenlets would wait for ever for a thread that is one."""
    patcher = sys.modules.get("eventlet.patcher")
    return patcher is not None and any(
        map(patcher.is_monkey_patched, ("thread", "socket", "select"))
    )


def start_thread(target: Callable[[], None], name: str) -> None:
    """Start a daemon thread, or a greenlet, which leaves no trace in `threading` when it is killed after a fork."""
    if not patched():
        threading.Thread(target=target, name=name, daemon=True).start()
        return
    import gevent

    gevent.spawn(target)


def current_thread() -> Any:
    """Return this thread, or greenlet."""
    if not patched():
        return threading.current_thread()
    import gevent

    return gevent.getcurrent()


def zmq_library() -> ModuleType:
    """Return pyzmq, or what it has for gevent: the same names."""
    if not patched():
        return zmq
    from zmq import green

    return green


def zmq_context() -> Any:
    """Return a new ZeroMQ context.

    It is pyzmq's own in C, without the classes in Python that `zmq` itself has over it. They do nothing that is needed
    here, and cost a process that makes its only context and socket as much time as these, and more pages of memory.
    """
    return zmq_library().Context() if patched() else backend.Context(io_threads=1)


def zmq_dealer(context: Any) -> Any:
    """Return a new DEALER of a context."""
    return (
        context.socket(zmq.DEALER)
        if hasattr(context, "socket")
        else backend.Socket(context, zmq.DEALER)
    )


def may_connect_to_itself() -> bool:
    """Say whether libpq, while it connects, lets another thread of this process answer: a greenlet only if it waits
    by psycogreen's callback. (A shell is built so: `worker/connection/shells.py`.)
    """
    return not patched() or extensions.get_wait_callback() is not None


class ConnectTimeout(psycopg2.OperationalError):
    """The server did not answer in time; libpq itself counts no time when psycopg2 waits by a callback."""


@contextlib.contextmanager
def connect_limit(limit_s: float | None) -> Iterator[None]:
    """Give a connect up after `limit_s` seconds (None or 0: never), where greenlets wait; raise `ConnectTimeout` then.

    See `connects_patiently` for where threads do.
    """
    if not limit_s or not patched() or extensions.get_wait_callback() is None:
        yield
        return
    import gevent

    with gevent.Timeout(limit_s, ConnectTimeout(f"the server did not answer within {limit_s:g} s")):
        yield


@contextlib.contextmanager
def connects_patiently(conn: extensions.connection, limit_s: float | None) -> Iterator[None]:
    """Give a connect of `conn` up after `limit_s` seconds (None or 0: never); raise `ConnectTimeout` then.

    A wait callback cannot be interrupted, whatever it is. But all it can do is to call `conn.poll()` and to wait for
    what that says: so, while it connects, it waits inside, with a limit.
    """
    if not limit_s or patched() or extensions.get_wait_callback() is None:
        yield
        return
    poll, deadline = conn.poll, time.monotonic() + limit_s

    def patient() -> int:
        while (events := _EVENTS.get(state := poll())) is not None:
            waiting = select.poll()
            waiting.register(conn.fileno(), events)
            if (
                not waiting.poll(max(0.0, (deadline - time.monotonic()) * 1000))
                and time.monotonic() >= deadline
            ):
                raise ConnectTimeout(f"{_server_of(conn)} did not answer within {limit_s:g} s")
        return state

    conn.__dict__["poll"] = patient
    try:
        yield
    finally:
        del conn.__dict__["poll"]


def _server_of(conn: extensions.connection) -> str:
    tried = libpq.tried(conn)
    return "the server" if tried is None else f"the server at {tried.host}, port {tried.port},"


def poller() -> select.poll:
    """Return the system's own poll object: gevent's knows neither POLLRDHUP nor a poll that does not switch."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("select"):
        return select.poll() if hasattr(select, "poll") else _eventlets_poller()
    made: select.poll = monkey.get_original("select", "poll")()
    return made


def _eventlets_poller() -> select.poll:
    """Return the system's poll object where eventlet has taken it away: connections of before must end all the same."""
    made: select.poll = sys.modules["eventlet.patcher"].original("select").poll()
    return made


def wait(poller: select.poll, timeout_s: float) -> list[tuple[int, int]]:
    """Wait for what the system's own `poller` watches; other greenlets go on meanwhile."""
    if not patched("select"):
        return poller.poll(timeout_s * 1000)
    deadline = time.monotonic() + timeout_s
    while not (ready := poller.poll(0)) and (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(_STEP_S, left_s))  # gevent's
    return ready

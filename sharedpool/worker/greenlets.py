"""gevent's and eventlet's monkey-patching: threads are greenlets, which share one thread.

Patched locks, sleeps and sockets work as they are; this module has what they cannot do. The
patching is looked up when it matters, not at import: a gunicorn worker is patched after its fork,
and may have this package from its parent.
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
    """Return True if gevent has patched a module of the standard library in this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched(module))


def is_eventlets() -> bool:
    """Return True if eventlet has patched this process.

    Its greenlets would wait for the link's thread for ever, because that is a greenlet, too.
    """
    patcher = sys.modules.get("eventlet.patcher")
    return patcher is not None and any(
        map(patcher.is_monkey_patched, ("thread", "socket", "select"))
    )


def start_thread(target: Callable[[], None], name: str) -> None:
    """Start a daemon thread, or a greenlet.

    A greenlet leaves no trace in `threading` when it is killed after a fork.
    """
    if not patched():
        threading.Thread(target=target, name=name, daemon=True).start()
        return
    import gevent

    gevent.spawn(target)


def current_thread() -> Any:
    """Return the current thread or greenlet."""
    if not patched():
        return threading.current_thread()
    import gevent

    return gevent.getcurrent()


def zmq_library() -> ModuleType:
    """Return pyzmq, or its version for gevent, which has the same names."""
    if not patched():
        return zmq
    from zmq import green

    return green


def zmq_context() -> Any:
    """Return a new ZeroMQ context.

    It is pyzmq's class in C, without the Python class over it. That would cost a process with one
    context and one socket as much time again, and more pages of memory, for nothing that is needed
    here.
    """
    return zmq_library().Context() if patched() else backend.Context(io_threads=1)


def zmq_dealer(context: Any) -> Any:
    """Return a new DEALER socket of a context."""
    return (
        context.socket(zmq.DEALER)
        if hasattr(context, "socket")
        else backend.Socket(context, zmq.DEALER)
    )


def may_connect_to_itself() -> bool:
    """Return True if another thread of this process can answer while libpq connects.

    Shells are built so (`worker/connection/shells.py`). A greenlet can answer only if libpq
    waits by psycogreen's callback.
    """
    return not patched() or extensions.get_wait_callback() is not None


class ConnectTimeout(psycopg2.OperationalError):
    """The server did not answer in time.

    libpq itself counts no time when psycopg2 waits by a callback.
    """


@contextlib.contextmanager
def connect_limit(limit_s: float | None) -> Iterator[None]:
    """Limit a connect in a greenlet to `limit_s` seconds (None or 0: no limit).

    Raise `ConnectTimeout` then. For threads see `connects_patiently`.
    """
    if not limit_s or not patched() or extensions.get_wait_callback() is None:
        yield
        return
    import gevent

    with gevent.Timeout(limit_s, ConnectTimeout(f"the server did not answer within {limit_s:g} s")):
        yield


@contextlib.contextmanager
def connects_patiently(conn: extensions.connection, limit_s: float | None) -> Iterator[None]:
    """Limit a connect in a thread with a wait callback to `limit_s` seconds (None or 0: no limit).

    Raise `ConnectTimeout` then. No wait callback can be interrupted. But all that it can do is to
    call `conn.poll()`, and to wait for what that returns. So during the connect `conn.poll()`
    itself waits, with the limit.
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
    """Return the system's own poll object.

    gevent's has no POLLRDHUP, and always switches to other greenlets.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("select"):
        return select.poll() if hasattr(select, "poll") else _eventlets_poller()
    made: select.poll = monkey.get_original("select", "poll")()
    return made


def _eventlets_poller() -> select.poll:
    """Return the system's poll object, which eventlet hides.

    Connections from before the patching must still be closed.
    """
    made: select.poll = sys.modules["eventlet.patcher"].original("select").poll()
    return made


def wait(poller: select.poll, timeout_s: float) -> list[tuple[int, int]]:
    """Wait with the system's own `poller`, while other greenlets run."""
    if not patched("select"):
        return poller.poll(timeout_s * 1000)
    deadline = time.monotonic() + timeout_s
    while not (ready := poller.poll(0)) and (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(_STEP_S, left_s))  # gevent's
    return ready

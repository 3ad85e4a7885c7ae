"""Under gevent's monkey-patching: threads are greenlets, and nothing may block the one thread that they share.

Locks, sleeps and sockets are patched as they are: what is here does what they cannot. Looked at when it is needed, not
at import: a gunicorn worker is patched after its fork, and may have this package from its parent.
"""

from __future__ import annotations

import select
import sys
import time
from types import ModuleType
from typing import Any

import zmq

_STEP_S = 0.001


def patched(module: str = "threading") -> bool:
    """Say whether gevent has patched a module of the standard library in this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched(module))


def current() -> Any:
    """Return the greenlet that runs as this thread, None if it is a real one."""
    if not patched():
        return None
    import gevent

    return gevent.getcurrent()


def zmq_library() -> ModuleType:
    """Return pyzmq, or what it has for gevent: the same names."""
    if not patched():
        return zmq
    from zmq import green

    return green


def poller() -> select.poll:
    """Return the system's own poll object: gevent's knows neither POLLRDHUP nor a poll that does not switch."""
    if not patched("select"):
        return select.poll()
    made: select.poll = sys.modules["gevent.monkey"].get_original("select", "poll")()
    return made


def wait(poller: select.poll, timeout_s: float) -> list[tuple[int, int]]:
    """Wait for what the system's own `poller` watches; other greenlets go on meanwhile."""
    if not patched("select"):
        return poller.poll(timeout_s * 1000)
    deadline = time.monotonic() + timeout_s
    while not (ready := poller.poll(0)) and (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(_STEP_S, left_s))  # gevent's
    return ready

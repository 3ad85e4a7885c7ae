"""Forks and exits: a child starts afresh, and a process that ends in order returns its leases.

Python's own forks (os.fork, multiprocessing, gunicorn, celery) run `reset_after_fork` themselves;
uWSGI's do not.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import sys
import weakref
from typing import Any, Protocol

from sharedpool.errors import PoolError

# Imported first, so that its `atexit` function is registered first, and runs after ours.
from sharedpool.worker.logs import logger


class Forkable(Protocol):
    """A pool, as this module uses it."""

    def start_afresh(self) -> None:
        """Forget the parent's connections."""

    def release_all(self) -> None:
        """Close and return everything."""


class ForkAware(Protocol):
    """A pool's part in one process, as this module uses it."""

    def disown(self) -> None:
        """Make inherited connections harmless."""

    @property
    def busy(self) -> bool:
        """Whether a connection is in use or waited for."""

    def before_fork_begins(self) -> None:
        """Close idle connections, and end the registration (the last one ends the link)."""

    def after_fork_in_parent(self) -> None:
        """Go on in the process that has forked."""


_LOGS_LIMIT_S = 1.0  # for slow log handlers
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK (Linux 4.14)


class ForkSafeFlag:
    """A flag that every fork clears in the child, also a fork that Python does not see.

    `page[0]` is 1 where it was set. To read it costs a tenth of asking for the process id. On
    systems without MADV_WIPEONFORK it is never set.
    """

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            self.page.madvise(_WIPE_ON_FORK)
            self._works = True
        except (OSError, ValueError, AttributeError):
            self._works = False

    def set(self) -> None:
        """Set the flag, in this process."""
        self.page[0] = self._works

    def clear(self) -> None:
        """Clear the flag."""
        self.page[0] = 0


# Used without a lock, because a fork may come at any moment, in any thread.
_pools: dict[int, weakref.ref[Forkable]] = {}
# Strong references: connections may be out of a pool that nobody refers to any more.
_local_pools: dict[int, ForkAware] = {}
_pid = os.getpid()


def register(pool: Forkable) -> None:
    """Register a pool for forks and the interpreter's end."""
    number = id(pool)
    _pools[number] = weakref.ref(pool, lambda _: _pools.pop(number, None))


def forget(pool: Forkable) -> None:
    """Unregister a pool that is disposed of."""
    _pools.pop(id(pool), None)


def add_local_pool(local: ForkAware) -> None:
    """Have a local pool disowned in forked children."""
    _local_pools[id(local)] = local


def remove_local_pool(local: ForkAware) -> None:
    """Unregister a local pool that holds nothing any more."""
    _local_pools.pop(id(local), None)


def reset_after_fork() -> None:
    """Make every pool of a forked child start afresh; the parent's connections stay the parent's.

    Python runs this after every fork that it sees. Call it where its hooks do not run: in uWSGI's
    `@postfork`. Does nothing in the process that made the pools, or the second time.
    """
    global _pid
    if _pid == os.getpid():
        return
    _pid = os.getpid()
    inherited = list(_local_pools.values())
    _local_pools.clear()
    for pool in _living():
        pool.start_afresh()
    for local in inherited:
        try:
            local.disown()
        except Exception:  # the others must be disowned all the same
            logger.exception("could not disown an inherited connection in process %d", _pid)


def is_before_uwsgis_forks() -> bool:
    """Return True if uWSGI is loading the application in the process that it will fork.

    uWSGI forks without regard to threads. If a thread runs Python at that moment, the children
    inherit the interpreter's lock as taken, and wait for it for ever. And at a reload uWSGI closes
    the descriptors of a ZeroMQ context that is still there.
    """
    uwsgi: Any = sys.modules.get("uwsgi")
    if not hasattr(uwsgi, "worker_id"):
        return False
    return not (uwsgi.worker_id() or uwsgi.mule_id() or uwsgi.i_am_the_spooler())


def _living() -> list[Forkable]:
    return [pool for ref in list(_pools.values()) if (pool := ref()) is not None]


def release_everything() -> None:
    """Dispose of every pool, because the process ends. Blocks as `release_all` does."""
    if _pid == os.getpid():
        for pool in _living():
            with contextlib.suppress(PoolError):  # disposed of by another thread
                pool.release_all()


def release_at_child_exit() -> None:
    """Have everything returned when a multiprocessing child ends.

    Such a child leaves by os._exit, and atexit does not run. Called when a process first needs a
    broker, because a child discards the finalizers from before its start.
    """
    for package in ("multiprocessing", "multiprocess", "billiard"):
        util = sys.modules.get(f"{package}.util")
        if util is not None:
            util.Finalize(None, release_everything, exitpriority=0)


def _part_before_fork() -> None:
    """End the link's threads before a fork, if no connection is in use.

    A child inherits the locks that other threads of its parent hold, and nobody there releases
    them. Python 3.12 and newer warn of such a fork.
    """
    held = list(_local_pools.values())
    if not any(local.busy for local in held):
        for local in held:
            local.before_fork_begins()
        if held:
            logger.flush(_LOGS_LIMIT_S)


def _go_on_after_fork() -> None:
    for local in list(_local_pools.values()):
        local.after_fork_in_parent()


atexit.register(release_everything)
os.register_at_fork(after_in_child=reset_after_fork)
if sys.version_info >= (
    3,
    12,
):  # older versions do not warn, and a parent keeps its idle connections
    os.register_at_fork(before=_part_before_fork, after_in_parent=_go_on_after_fork)

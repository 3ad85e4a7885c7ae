"""Forks and exits: a child starts afresh, a process that ends in good order returns its leases.

Python's own forks (os.fork, multiprocessing, gunicorn, celery) run `reset_after_fork` by themselves; uWSGI's do not.
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
from sharedpool.worker.logs import (
    logger,
)  # whose `atexit` is registered first, and so runs after ours


class Forkable(Protocol):
    """A pool, as forks and exits see it."""

    def start_afresh(self) -> None:
        """Forget what the parent held."""

    def release_all(self) -> None:
        """Close and return everything."""


class ForkAware(Protocol):
    """A pool's local pool in one process."""

    def disown(self) -> None:
        """Make inherited connections harmless."""

    @property
    def busy(self) -> bool:
        """Whether a connection is in use, or waited for."""

    def before_fork_begins(self) -> None:
        """Close what lies idle, and end the registration; the last one takes the link's thread along."""

    def after_fork_in_parent(self) -> None:
        """Go on, in the process that has forked."""


_LOGS_LIMIT_S = 1.0  # to wait for a log handler that is slow
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK (Linux 4.14)


class ForkSafeFlag:
    """A byte that a fork wipes, of whatever kind: `page[0]` is 1 in the process that opened it, and 0 in its children.

    Reading it costs a tenth of what asking for the process id does. Where the system cannot do that it is never open.
    """

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            self.page.madvise(_WIPE_ON_FORK)
            self._works = True
        except (OSError, ValueError, AttributeError):
            self._works = False

    def set(self) -> None:
        """Open it, in this process."""
        self.page[0] = self._works

    def clear(self) -> None:
        """Shut it."""
        self.page[0] = 0


# Looked at without a lock: a fork may come at any moment, in any thread.
_pools: dict[int, weakref.ref[Forkable]] = {}
_local_pools: dict[
    int, ForkAware
] = {}  # strongly: connections may be out of a pool that nobody refers to any more
_pid = os.getpid()


def register(pool: Forkable) -> None:
    """Have `pool` told of forks and of the interpreter's end."""
    number = id(pool)
    _pools[number] = weakref.ref(pool, lambda _: _pools.pop(number, None))


def forget(pool: Forkable) -> None:
    """Stop that: the pool is disposed of."""
    _pools.pop(id(pool), None)


def add_local_pool(local: ForkAware) -> None:
    """Have `local` disowned in forked children."""
    _local_pools[id(local)] = local


def remove_local_pool(local: ForkAware) -> None:
    """Stop that: nothing is held any more."""
    _local_pools.pop(id(local), None)


def reset_after_fork() -> None:
    """Make every pool of a forked child start afresh; the parent's connections stay the parent's.

    Runs by itself after every fork that Python knows of. Call it where the hooks do not fire: in uWSGI's `@postfork`.
    Does nothing in the process that made the pools, or the second time.
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
    """Say whether uWSGI is loading the application in the process that it will fork.

    It does so whatever other threads do. Of one that runs Python at that moment the children inherit the interpreter's
    lock, taken, and never get it; and at a reload uWSGI closes the descriptors under a ZeroMQ that is still there.
    """
    uwsgi: Any = sys.modules.get("uwsgi")
    if not hasattr(uwsgi, "worker_id"):
        return False
    return not (uwsgi.worker_id() or uwsgi.mule_id() or uwsgi.i_am_the_spooler())


def _living() -> list[Forkable]:
    return [pool for ref in list(_pools.values()) if (pool := ref()) is not None]


def release_everything() -> None:
    """Dispose of every pool that this process uses: it is about to end. Blocks as `Pool.release_all` does."""
    if _pid == os.getpid():
        for pool in _living():
            with contextlib.suppress(PoolError):  # disposed of meanwhile
                pool.release_all()


def release_at_child_exit() -> None:
    """Have everything returned when a multiprocessing child ends: it leaves by os._exit, and atexit does not run.

    Called when a process first needs a broker: a child's finalizers of before its start are thrown away.
    """
    for package in ("multiprocessing", "multiprocess", "billiard"):
        util = sys.modules.get(f"{package}.util")
        if util is not None:
            util.Finalize(None, release_everything, exitpriority=0)


def _part_before_fork() -> None:
    """End the threads of a process that is about to fork, if none of its connections is in use.

    A child gets the locks that the other threads of its parent hold, and nobody who lets go of them. Python 3.12 and
    newer warn of such a fork.
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
if sys.version_info >= (3, 12):  # before that nobody minds, and a parent keeps its idle connections
    os.register_at_fork(before=_part_before_fork, after_in_parent=_go_on_after_fork)

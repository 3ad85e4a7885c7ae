"""gunicorn: `from sharedpool.integrations.gunicorn import *` in gunicorn.conf.py.

The pool works without this module. A worker that exits normally returns its leases, and the broker
notices within milliseconds that a worker was killed. This is for a worker that has waited for
its requests in vain (`graceful_timeout`), and has a thread that is still in a query. It would hang
at its exit, so its connections are ended.

There is no `child_exit`: the broker has seen a worker's end before gunicorn's master does.
"""

from __future__ import annotations

import os
from typing import Protocol

from sharedpool.worker import forks

__all__ = ["worker_exit"]


class Worker(Protocol):
    """A gunicorn worker."""

    pid: int


def worker_exit(server: object, worker: Worker) -> None:
    """Close all connections of the worker's pools, those in use included, and return all leases.

    Blocks until the backends are gone, for some seconds at most.
    """
    # gunicorn also calls this in the master, for a worker that it wanted to stop and that was gone
    # already. The master's pools must live: with --preload the next workers inherit them.
    if worker.pid == os.getpid():
        forks.release_everything()

"""gunicorn: `from sharedpool.integrations.gunicorn import *` in gunicorn.conf.py.

The pool works without it: a worker that ends in good order returns its leases, and the broker sees by itself, within
milliseconds, that one was killed. This is for the workers in between: those that have given up waiting for a request
(`graceful_timeout`) and then hang at their exit, because its thread is still in a query. Their connections are ended.

There is no `child_exit`: the master could tell the broker nothing that it has not seen sooner.
"""

from __future__ import annotations

import os
from typing import Protocol

from sharedpool.worker import forks

__all__ = ["worker_exit"]


class Worker(Protocol):
    """gunicorn's worker."""

    pid: int


def worker_exit(server: object, worker: Worker) -> None:
    """Dispose of the worker's pools: close every connection, those in use included, and return all leases.

    Blocks until the backends are gone, at most some seconds.
    """
    # gunicorn calls it in the master too, for a worker that was gone when it was to be told to end. With --preload the
    # pools there are those that the next workers inherit.
    if worker.pid == os.getpid():
        forks.release_everything()

"""Celery: call `connect_signals()` beside `config_pool`, in the module that makes the app.

The pool works without this module in every kind of worker. A prefork child opens its own
connections, and the broker notices by itself when a child ends or is killed. But when the worker
stops, its children stay for a second after their last task, and then leave without running exit
handlers. Until then their idle connections stay open.

Nothing is needed when a process starts, nor with `-P threads` and `-P solo`.
"""

from __future__ import annotations

from celery import signals

from sharedpool.worker import forks


def connect_signals() -> None:
    """Have each prefork child close its connections after its last task. Idempotent."""
    signals.worker_process_shutdown.connect(_release, weak=False, dispatch_uid="sharedpool")


def _release(**_: object) -> None:
    forks.release_everything()

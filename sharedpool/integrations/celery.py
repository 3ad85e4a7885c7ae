"""Celery: call `connect_signals()` beside `config_pool`, in the module that makes the app.

The pool works without it, in every kind of worker: a prefork child opens connections of its own, and the broker sees by
itself when one has ended or was killed. But when the worker ends, warm or cold, its children stay for a second after
their last task, and leave without running exit handlers: until then their idle connections live on the server.

Nothing needs to be done when a process starts, nor with `-P threads` and `-P solo`, which end as any program does.
"""

from __future__ import annotations

from celery import signals

from sharedpool.worker import forks


def connect_signals() -> None:
    """Have a prefork child close its connections and return its leases once it has done its last task. Idempotent."""
    signals.worker_process_shutdown.connect(_release, weak=False, dispatch_uid="sharedpool")


def _release(**_: object) -> None:
    forks.release_everything()

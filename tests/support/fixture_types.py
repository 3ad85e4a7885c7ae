"""Types of the fixtures in `tests/conftest.py`."""

from collections.abc import Callable

from sharedpool.worker.pool import Pool

MakePool = Callable[..., Pool]
Backends = Callable[[Pool], set[int]]

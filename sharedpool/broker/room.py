"""Room for descriptors: how many a broker may still open, and who is let in when there are few.

libzmq accepts in a thread of its own, and ends the process when it gets no descriptor for one who connects by ipc. So
some are always kept for it. Whoever comes is let in as long as `door` are free; below that the address is hidden, and
only those who stood in its queue come in (`backlog`). What the broker opens itself, it opens as long as `reserve` are
free, half of `door`. The rest is left for those who come in between two looks; there is one in each round of the
broker's loop, and each who comes in wakes it. A short queue slows a crowd down: who finds it full tries again.
(By tcp nobody gets in then, and libzmq goes on.)
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable

from sharedpool.errors import SharedPoolError

# Of one broker by itself: its files, its control connection, libzmq's.
_OWN = 24
_LEAST, _MOST = 24, 256


def counted() -> int:
    """Return how many descriptors this process has open: a microsecond from Linux 6.2 on, else one for each."""
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))


class Room:
    """How many descriptors there may be, and how many of them are kept. `count`: how many are open."""

    def __init__(self, limit: int | None = None, count: Callable[[], int] = counted) -> None:
        """`limit`: the process's own, if none is given."""
        self.limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
        self._count = count
        self.door = min(_MOST, max(_LEAST, self.limit // 8))
        self.reserve = self.door // 2
        self.backlog = self.door // (2 if self.door == _MOST else 8)

    def free(self) -> int:
        """Return how many may still be opened; as many as are allowed where that cannot be told."""
        try:
            return self.limit - self._count()
        except FileNotFoundError:
            return self.limit
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            return 0

    def spare(self) -> bool:
        """Say whether the broker itself may open one more."""
        return self.free() > self.reserve

    def make_sure(self) -> None:
        """Raise `SharedPoolError` when a broker would have too few to let anybody in."""
        if self.limit < _OWN + self.door:
            raise SharedPoolError(
                f"a broker needs {_OWN + self.door} descriptors and some four for each worker, and may have only"
                f" {self.limit} open: raise the limit (`ulimit -n`, LimitNOFILE=)"
            )

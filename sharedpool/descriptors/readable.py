"""`select.select` for descriptors of any number: that one fails from 1,024 on."""

from __future__ import annotations

import math
import select
from collections.abc import Iterable
from typing import Protocol, TypeVar


class HasFileno(Protocol):
    """A file or socket."""

    def fileno(self) -> int:
        """Return the descriptor."""


File = TypeVar("File", bound=int | HasFileno)


def readable(files: Iterable[File], timeout_s: float) -> list[File]:
    """Return the files that can be read or have ended.

    Blocks until there is one, at most `timeout_s` seconds.
    """
    by_number = {each if isinstance(each, int) else each.fileno(): each for each in files}
    poller = select.poll()
    for number in by_number:
        poller.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poller.poll(math.ceil(max(0.0, timeout_s) * 1000))]

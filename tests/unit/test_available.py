"""A process that has hardly any descriptors left is told so before libzmq finds out, which would
end it."""

import os
import resource
from collections.abc import Iterator

import pytest

from sharedpool import PoolError
from sharedpool.descriptors.available import require


@pytest.fixture
def few() -> Iterator[list[int]]:
    """All descriptors that this process can have, to be closed one by one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    held: list[int] = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    yield held
    for each in held:
        os.close(each)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_few_free_descriptors_are_an_error(few: list[int]) -> None:
    for _ in range(8):
        os.close(few.pop())
    require(8, "the pool")
    require(8, "the pool")  # nothing was kept
    os.close(few.pop())
    with pytest.raises(
        PoolError, match=r"the pool needs 10 descriptors, .* of the 200 .*ulimit -n"
    ):
        require(10, "the pool")
    require(8, "the pool")

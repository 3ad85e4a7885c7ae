"""Waiting for descriptors, whatever their numbers are."""

import os
import resource
from collections.abc import Iterator

import pytest

from sharedpool.descriptors.readable import readable


@pytest.fixture
def far_up() -> Iterator[tuple[int, int]]:
    """The ends of a pipe, the end to read from beyond what `select.select` can take."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 3000), limits[1]))
    low, writing = os.pipe()
    os.dup2(low, 2500)
    os.close(low)
    yield 2500, writing
    os.close(2500)
    os.close(writing)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_readable_descriptors_are_told_from_others(far_up: tuple[int, int]) -> None:
    reading, writing = far_up
    quiet, held = os.pipe()
    assert readable([reading, quiet], 0) == []
    os.write(writing, b"x")
    assert readable([reading, quiet], 20) == [reading]
    os.close(held)
    assert readable([quiet], 20) == [quiet]  # its end
    os.close(quiet)

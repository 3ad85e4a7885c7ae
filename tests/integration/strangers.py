"""The words of a worker, said by hand."""

import os

from sharedpool.wire.codec import encode
from sharedpool.wire.messages import PROTOCOL_VERSION, Hello
from sharedpool.wire.values import PoolSpec


def hello(pool: str, version: int = PROTOCOL_VERSION) -> bytes:
    return encode(Hello(version, os.getpid(), "", "bare", PoolSpec(pool, 3, 60_000)))

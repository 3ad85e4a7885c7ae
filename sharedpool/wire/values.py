"""What the messages are made of: names of leases and backends, reports, histograms."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec

from sharedpool.wire.buckets import BUCKETS

# PostgreSQL's int and bigint: a greater number would make the broker's own queries fail.
Int4 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Int8 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Token(NamedTuple):
    """A lease's name: the broker's epoch, and a serial that is never used twice."""

    epoch: int
    serial: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.serial}"


NO_TOKEN = Token(0, 0)


class Struct(msgspec.Struct, frozen=True, array_like=True):
    """Parent of everything on the wire."""


class Backend(Struct, frozen=True, eq=False):
    """A PostgreSQL server process. The first three fields are its identity.

    A pid may be used again. A pid together with its start time may not. Times are 0 where the
    server does not tell them.
    """

    pid: Int4
    start_us: Int8 = 0
    # When its postmaster started: this tells one server from another.
    boot_us: Int8 = 0
    # No proxy is in between: the end of the connection's socket is the backend's end.
    direct: bool = False
    # A pooler is in between, which may lend the backend to others after this session. The text is
    # this session's application_name.
    pooled: str | None = None
    # The connection cannot move: it is encrypted, goes through a pooler, or its worker hands
    # nothing over.
    fixed: bool = False

    @property
    def identity(self) -> tuple[int, int, int]:
        """What tells this backend from every other."""
        return (self.pid, self.start_us, self.boot_us)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and self.identity == other.identity

    # Without it msgspec's own would apply, which compares all fields.
    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.identity)


class PoolSpec(Struct, frozen=True):
    """What a session asks of its pool. The first session that names a pool sets the limit."""

    name: str
    max_conn: int
    expiration_ms: int
    max_checkout_ms: int = 0
    server: str = ""
    max_waiting: int = 0
    # Sessions of another group are in another pool, with another name. Both share the server and
    # the broker's limit over all pools.
    group: str = ""
    # A checkout longer than `max_checkout_ms` is ended, and not only reported.
    end_overdue: bool = False
    # Set for an automatic broker. It serves a whole server and has a pool for each database.
    database: str = ""
    # The database in which hosts share the pool's limit, where that is not the pool's own.
    shares_database: str = ""

    def is_pool_of(self, other: PoolSpec) -> bool:
        """Return True if both specify the same pool."""
        return (self.name, self.database) == (other.name, other.database)


class Phase(StrEnum):
    """What a worker is doing with a lease."""

    CONNECTING = "connecting"
    IN_USE = "in_use"
    IDLE = "idle"
    CLOSING = "closing"


class LeaseReport(Struct, frozen=True):
    """One lease as its worker sees it."""

    token: Token
    phase: Phase
    # Time in this phase.
    age_ms: int
    thread: str = ""
    backend: Backend | None = None
    # Where it was checked out, innermost call first, if the pool has `debug_checkouts`.
    stack: list[str] = []
    # How often it had moved in a lane when it came (`board.py`).
    moves: int = 0


class Holder(Struct, frozen=True):
    """A process that holds connections, for the text of an error."""

    label: str
    count: int
    longest_ms: int
    # Where the longest was checked out, if known.
    site: str = ""


class Histogram(Struct, frozen=True):
    """Counts by bucket (`buckets.py`), and the sum of all values."""

    counts: Annotated[list[Count], msgspec.Meta(min_length=BUCKETS, max_length=BUCKETS)]
    total_us: Count


class Timings(Struct, frozen=True):
    """How long things took in one session. Totals since its registration, so that none is lost."""

    # The number of the registration.
    serial: int
    created: Histogram
    waited: Histogram
    used: Histogram

"""The settings of one broker, and the options by which users give them.

`BrokerSettings` declares each setting once. `OPTIONS` lists those that users may give. From it come

- the options of `sharedpool broker` and `sharedpool run` (`cli/options.py`),
- their environment variables,
- the keys of the configuration file (`launch/config_file.py`),
- the table in `cli/README.md`, which a test compares with the declarations.

So a new option is read, checked and documented by a new field here and a new row there. To have an
effect it is passed on in `server/startup.py`, and where scripts may give it, by `start_broker`
(`launch/run.py`).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, MISSING, dataclass, field, fields, replace
from enum import Enum
from typing import Annotated, Any, get_type_hints

from sharedpool.broker.core.group_terms import GroupTerms

DEFAULT_TTL_S = 15.0


class Kind(Enum):
    """The kinds of values; a kind's own value stands for one in the help."""

    COUNT = "N"
    SECONDS = "SECONDS"
    TEXT = "TEXT"


@dataclass(frozen=True, slots=True)
class Option:
    """A setting that users may give."""

    name: str  # in the configuration file, such as max_checkout
    kind: Kind
    help: str
    _: KW_ONLY
    unset: str = ""  # what holds without the option, in words; empty: the field's default
    metavar: str = ""  # stands for the value in the help; empty: the kind's
    required: bool = False
    broker_only: bool = False  # `sharedpool run` does not have the option
    automatic: bool = False  # an automatic broker takes the option from the environment
    # The field of `BrokerSettings`, and its default where `unset` does not describe that.
    field: str = ""
    default: Any = None

    @property
    def flag(self) -> str:
        """The name on the command line, such as --max-checkout."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable, such as SHAREDPOOL_MAX_CHECKOUT."""
        return "SHAREDPOOL_" + self.name.upper()


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """How one broker runs. Times are in seconds."""

    address: Annotated[
        str,
        Option(
            "bind",
            Kind.TEXT,
            "Listen at this address: ipc:///path/to.sock or tcp://127.0.0.1:port.",
            unset="broker.sock in the user's runtime directory",
            metavar="ADDRESS",
            broker_only=True,
        ),
    ]
    # Without a limit over all pools, each pool has only its own.
    max_conn: Annotated[
        int | None,
        Option(
            "max_conn",
            Kind.COUNT,
            "Limit of connections to PostgreSQL, over all pools and processes."
            " A pool's own limit is never above it.",
            required=True,
        ),
    ] = None
    dsn: Annotated[
        str | None,
        Option(
            "dsn",
            Kind.TEXT,
            "Where to open the one control connection, which confirms that the backends of dead"
            " workers are gone.",
            unset="DATABASE_DSN, DATABASE_URL, libpq's environment",
            metavar="DSN",
        ),
    ] = field(default=None, repr=False)
    expiration_s: Annotated[
        float | None,
        Option(
            "expiration",
            Kind.SECONDS,
            "Longest time that a connection may lie idle. Pools may ask for less.",
            unset="as the pools say",
        ),
    ] = None
    max_checkout_s: Annotated[
        float,
        Option(
            "max_checkout",
            Kind.SECONDS,
            "Report each connection that is checked out for longer, with its holder.",
            unset="off",
        ),
    ] = 0.0
    ttl_s: Annotated[
        float,
        Option(
            "ttl",
            Kind.SECONDS,
            "Silence after which a worker is suspect. Heartbeats come every third of it, or every"
            " half from a worker that holds nothing.",
            automatic=True,
        ),
    ] = DEFAULT_TTL_S
    linger_s: Annotated[
        float | None,
        Option(
            "linger",
            Kind.SECONDS,
            "Leave when unused for so long.",
            unset="stay",
            broker_only=True,
            automatic=True,
        ),
    ] = None
    # An automatic broker has no owner. It serves all databases of its server, and pools of the same
    # name in two databases are two pools. Its control connection avoids the pools' databases, and
    # is closed while the broker is unused (`broker/postgres/database.py`).
    automatic: bool = False
    drain_timeout_s: Annotated[
        float,
        Option(
            "drain_timeout",
            Kind.SECONDS,
            "How long to wait for leases to come back after SIGTERM or SIGINT.",
            broker_only=True,
        ),
    ] = 10.0
    # No later broker will use the address: the broker removes its lock file when it ends.
    one_off: bool = False
    # Two brokers of one scope must not serve at the same time (`broker/postgres/leadership.py`).
    # Empty: the scope follows from the address.
    scope: str = ""
    metrics: Annotated[
        str,
        Option(
            "metrics",
            Kind.TEXT,
            "Serve Prometheus metrics and a status page at this address, such as 127.0.0.1:9187.",
            unset="nowhere",
            metavar="HOST:PORT",
        ),
    ] = ""
    notify: str = ""  # socket of the service manager (sd_notify); empty: there is none
    listener: int | None = None  # descriptor of a socket that listens at `address` already
    groups: dict[str, GroupTerms] = field(default_factory=dict)
    # Limits of pools by name. They hold whatever the workers ask for.
    limits: dict[str, int] = field(default_factory=dict)


def _options() -> tuple[Option, ...]:
    hints = get_type_hints(BrokerSettings, include_extras=True)
    found = []
    for each in fields(BrokerSettings):
        for option in getattr(hints[each.name], "__metadata__", ()):
            default = None if option.unset or each.default is MISSING else each.default
            found.append(replace(option, field=each.name, default=default))
    return tuple(found)


OPTIONS = _options()

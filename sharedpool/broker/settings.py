"""How one broker runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from sharedpool.broker.core.group_terms import GroupTerms


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """How one broker runs. Times in seconds; `max_conn` None: each pool's own limit only; `linger_s` None: stay.

    `metrics`: where they are served (`host:port`), empty: nowhere. `notify`: systemd's socket, or nobody's. `listener`:
    the descriptor of a socket that somebody else made and keeps, listening at `address` already. `scope`: what no two
    brokers may count to at the same time (see `broker/postgres/leadership.py`); empty: as the address tells. `limits`:
    of pools, by name, whatever their users ask for. `automatic`: nobody owns it. It serves all databases of its server,
    and pools of one name in two of them are two pools; its control connection is in no pool's database where it can be
    helped, nor anywhere while nobody uses the broker (`broker/postgres/database.py`).
    """

    address: str
    max_conn: int | None = None
    dsn: str | None = field(default=None, repr=False)
    expiration_s: float | None = None
    max_checkout_s: float = 0.0
    ttl_s: float = 15.0
    linger_s: float | None = None
    automatic: bool = False
    drain_timeout_s: float = 10.0
    one_off: bool = False  # nobody will ever listen there again: leave no lock file behind
    scope: str = ""
    metrics: str = ""
    notify: str = ""
    listener: int | None = None
    groups: dict[str, GroupTerms] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

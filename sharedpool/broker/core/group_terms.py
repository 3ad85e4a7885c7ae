"""What a group of pools is promised of the limit over all pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharedpool.errors import ConfigError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class GroupTerms:
    """What one group is promised: `reserved` slots, at most `max_conn` (None: no limit of its own), by `priority`."""

    reserved: int = 0
    max_conn: int | None = None
    priority: int = 0


def check_terms(terms: dict[str, GroupTerms], cap: int | None, where: str = "groups") -> None:
    """Raise `ConfigError` for terms that cannot be kept together."""
    if terms and cap is None:
        raise ConfigError(
            f"{where}: groups share a limit over all pools, and there is none (max-conn)"
        )
    for name, group in terms.items():
        if group.max_conn is not None and group.max_conn < group.reserved:
            raise ConfigError(
                f"{where}.{name}: min {group.reserved} is more than max {group.max_conn}"
            )
    reserved = sum(group.reserved for group in terms.values())
    if cap is not None and reserved > cap:
        raise ConfigError(
            f"{where}: {reserved} connections are reserved (min), of {cap} in all (max-conn)"
        )

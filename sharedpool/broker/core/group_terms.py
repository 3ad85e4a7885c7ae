"""The terms of a group of pools under the limit over all pools."""

from __future__ import annotations

from dataclasses import dataclass

from sharedpool.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GroupTerms:
    """One group's terms."""

    reserved: int = 0  # slots that are kept free for the group
    max_conn: int | None = None  # None: no limit of its own
    priority: int = 0  # higher goes first, beyond the reservations


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

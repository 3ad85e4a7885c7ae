"""Read a broker's configuration file (TOML), and report everything that is wrong with it.

max_conn = 20
expiration = 60.0

[pools.reports]
max_conn = 5

[groups.web]
min = 8
priority = 10

[groups.celery]
max = 10
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from sharedpool.broker.core.group_terms import GroupTerms, check_terms
from sharedpool.broker.settings import OPTIONS, Kind
from sharedpool.errors import ConfigError

_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Least = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]
_TYPES: dict[Kind, Any] = {Kind.COUNT: _Count, Kind.SECONDS: _Seconds, Kind.TEXT: str}
_OPTIONS = {option.name: _TYPES[option.kind] for option in OPTIONS}


class _GroupTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    min: _Least = 0
    max: _Count | None = None
    priority: int = 0


class _PoolTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_conn: _Count


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The content of a configuration file."""

    path: Path
    options: dict[str, Any]  # by their names, such as max_checkout
    groups: dict[str, GroupTerms] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)  # of pools, by name


def read(path: str | Path) -> ConfigFile:
    """Read a file. Raise a `ConfigError` with one line for each mistake."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path}: {error}") from None
    wrong: list[str] = []
    groups = _tables(tables.pop("groups", {}), "groups", _GroupTable, wrong)
    pools = _tables(tables.pop("pools", {}), "pools", _PoolTable, wrong)
    for name in tables.keys() - _OPTIONS.keys():
        wrong.append(
            f"{name}: there is no such setting (there are {', '.join(_OPTIONS)}, groups and pools)"
        )
    known = tables.keys() & _OPTIONS.keys()
    options = {name: _convert(tables[name], _OPTIONS[name], name, wrong) for name in sorted(known)}
    terms = {
        name: GroupTerms(table.min, table.max, table.priority) for name, table in groups.items()
    }
    if not wrong and "max_conn" in options:  # otherwise the command line gives it
        try:
            check_terms(terms, options["max_conn"])
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(f"{path}: {each}" for each in sorted(wrong)))
    return ConfigFile(
        Path(path).absolute(),
        options,
        terms,
        {name: table.max_conn for name, table in pools.items()},
    )


def _tables(value: object, where: str, kind: Any, wrong: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        wrong.append(f"{where}: must be tables, as [{where}.NAME]")
        return {}
    found = {name: _convert(table, kind, f"{where}.{name}", wrong) for name, table in value.items()}
    return {name: table for name, table in found.items() if table is not None}


def _convert(value: object, kind: Any, where: str, wrong: list[str]) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        wrong.append(f"{where}{place.rstrip('`')}: {text}")
        return None

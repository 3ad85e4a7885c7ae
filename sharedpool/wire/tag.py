"""The application_name of a pool's connections: by it the server shows whose they are.

`sharedpool NAME [instance]`: the instance is the broker's own, kept over its restarts. Plain ASCII and at most 63
bytes, so that the server shows it unchanged.
"""

from __future__ import annotations

_PREFIX = "sharedpool "
_MOST_BYTES = 63  # NAMEDATALEN - 1


def tag_of(pool: str, instance: str) -> str:
    """Return the tag of a pool's connections."""
    suffix = f" [{instance}]"
    name = pool.encode("ascii", "backslashreplace").decode()
    return _PREFIX + name[: _MOST_BYTES - len(_PREFIX) - len(suffix)] + suffix


def pattern_of(instance: str) -> str:
    """Return the LIKE pattern of all of a broker's tags."""
    return f"{_PREFIX}% [{instance}]"


def pool_of_tag(tag: str) -> str:
    """Return the pool's name, as far as the tag has room for it."""
    return tag.removeprefix(_PREFIX).rpartition(" [")[0]

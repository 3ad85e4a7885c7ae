"""The application_name of a pool's connections, which shows on the server whose they are.

It is `sharedpool NAME [instance]`. The instance identifies the broker and survives its restarts.
The server shows only 63 bytes of plain ASCII, so a longer name is cut and gets a digest that tells
it from others.
"""

from __future__ import annotations

from sharedpool.digests import digest_of

_PREFIX = "sharedpool "
_MAX_BYTES = 63  # NAMEDATALEN - 1


def tag_of(pool: str, instance: str) -> str:
    """Return the application_name (*tag*) of a pool's connections."""
    suffix = f" [{instance}]"
    name = pool.encode("ascii", "backslashreplace").decode()
    room = _MAX_BYTES - len(_PREFIX) - len(suffix)
    if len(name) > room:
        digest = digest_of(pool.encode(), 4).hex()
        name = f"{name[: room - len(digest) - 1]}~{digest}"
    return _PREFIX + name + suffix


def pattern_of(instance: str) -> str:
    """Return a LIKE pattern that matches all tags of a broker."""
    return f"{_PREFIX}% [{instance}]"


def pool_of_tag(tag: str) -> str:
    """Return the pool's name in a tag; see `shown`."""
    return tag.removeprefix(_PREFIX).rpartition(" [")[0]


def shown(pool: str, instance: str) -> str:
    """Return a pool's name as its tag shows it. A plain and short name is shown unchanged."""
    return pool_of_tag(tag_of(pool, instance))

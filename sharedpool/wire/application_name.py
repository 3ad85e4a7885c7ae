"""The application_name of a pool's connections: by it the server shows whose they are.

`sharedpool NAME [instance]`: the instance is the broker's own, kept over its restarts. Plain ASCII and at most 63
bytes, so that the server shows it unchanged; a name that is too long is cut, and told from others by a digest.
"""

from __future__ import annotations

import hashlib

_PREFIX = "sharedpool "
_MOST_BYTES = 63  # NAMEDATALEN - 1


def tag_of(pool: str, instance: str) -> str:
    """Return the tag of a pool's connections."""
    suffix = f" [{instance}]"
    name = pool.encode("ascii", "backslashreplace").decode()
    room = _MOST_BYTES - len(_PREFIX) - len(suffix)
    if len(name) > room:
        digest = hashlib.blake2s(pool.encode(), digest_size=4).hexdigest()
        name = f"{name[: room - len(digest) - 1]}~{digest}"
    return _PREFIX + name + suffix


def pattern_of(instance: str) -> str:
    """Return the LIKE pattern of all of a broker's tags."""
    return f"{_PREFIX}% [{instance}]"


def pool_of_tag(tag: str) -> str:
    """Return the pool's name as the tag has it: see `shown`."""
    return tag.removeprefix(_PREFIX).rpartition(" [")[0]


def shown(pool: str, instance: str) -> str:
    """Return the name by which a pool's tag tells it: its own, if that is plain and short."""
    return pool_of_tag(tag_of(pool, instance))

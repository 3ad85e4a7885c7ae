"""Messages as JSON."""

from __future__ import annotations

import msgspec

from sharedpool.wire.values import Token


def document(value: object) -> object:
    """Return a message as dicts and lists. On the wire its fields have no names."""
    if isinstance(value, msgspec.Struct):
        return {name: document(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Token):
        return str(value)
    return [document(each) for each in value] if isinstance(value, list) else value

"""Messages as JSON shows them."""

from __future__ import annotations

import msgspec

from sharedpool.wire.messages import Token


def document(value: object) -> object:
    """Return what goes into JSON: on the wire the fields have no names."""
    if isinstance(value, msgspec.Struct):
        return {name: document(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Token):
        return str(value)
    return [document(each) for each in value] if isinstance(value, list) else value

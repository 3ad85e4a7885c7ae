"""Messages as JSON shows them."""

from __future__ import annotations

import msgspec


def document(value: object) -> object:
    """Return what goes into JSON: on the wire the fields have no names."""
    if isinstance(value, msgspec.Struct):
        return {name: document(getattr(value, name)) for name in value.__struct_fields__}
    return [document(each) for each in value] if isinstance(value, list) else value

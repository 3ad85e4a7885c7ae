"""Encode messages as msgpack, and decode them with every field's type checked. No pickle.

For people and programs, messages are shown as JSON.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from sharedpool.errors import ProtocolError
from sharedpool.wire.desk import FromDesk, Moved, ToDesk
from sharedpool.wire.messages import Hello, ToBroker, ToWorker
from sharedpool.wire.reports import FromOperator, ToOperator
from sharedpool.wire.values import Token

# The largest message is a RENEW with all leases of a big pool; nothing of ours is longer.
MAX_FRAME_BYTES = 1 << 20

_encoder = msgspec.msgpack.Encoder()
_to_broker: msgspec.msgpack.Decoder[ToBroker | FromOperator] = msgspec.msgpack.Decoder(
    ToBroker | FromOperator
)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_operator: msgspec.msgpack.Decoder[ToOperator] = msgspec.msgpack.Decoder(ToOperator)
_to_desk: msgspec.msgpack.Decoder[ToDesk] = msgspec.msgpack.Decoder(ToDesk)
_from_desk: msgspec.msgpack.Decoder[FromDesk] = msgspec.msgpack.Decoder(FromDesk)
_moved: msgspec.msgpack.Decoder[Moved] = msgspec.msgpack.Decoder(Moved)
_HELLO_TAG = Hello.__struct_config__.tag

M = TypeVar("M")


def encode(
    message: ToBroker | ToWorker | ToDesk | FromDesk | Moved | FromOperator | ToOperator,
) -> bytes:
    """Return `message` as one frame or packet."""
    return _encoder.encode(message)


def decode_to_broker(frame: bytes) -> ToBroker | FromOperator:
    """Decode a worker's or the command line's message, or raise `ProtocolError`."""
    return _decode(_to_broker, frame)


def decode_to_worker(frame: bytes) -> ToWorker:
    """Decode a broker's message to a worker, or raise `ProtocolError`."""
    return _decode(_to_worker, frame)


def decode_to_operator(frame: bytes) -> ToOperator:
    """Decode a broker's message to the command line, or raise `ProtocolError`."""
    return _decode(_to_operator, frame)


def decode_to_desk(packet: bytes) -> ToDesk:
    """Decode a worker's message to the desk, or raise `ProtocolError`."""
    return _decode(_to_desk, packet)


def decode_from_desk(packet: bytes) -> FromDesk:
    """Decode the desk's message to a worker, or raise `ProtocolError`."""
    return _decode(_from_desk, packet)


def decode_moved(packet: bytes) -> Moved:
    """Decode a message in the lane, or raise `ProtocolError`."""
    return _decode(_moved, packet)


def hello_version(frame: bytes) -> int | None:
    """Return the version of a HELLO of any protocol version; None if the frame is no HELLO.

    So the broker can answer a worker of another version with a REJECT, which no version changes.
    """
    try:
        fields = msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if (
        isinstance(fields, list)
        and len(fields) > 1
        and fields[0] == _HELLO_TAG
        and isinstance(fields[1], int)
    ):
        return fields[1]
    return None


def document(value: object) -> object:
    """Return a message as dicts and lists, for JSON. On the wire its fields have no names."""
    if isinstance(value, msgspec.Struct):
        return {name: document(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Token):
        return str(value)
    return [document(each) for each in value] if isinstance(value, list) else value


def _decode(decoder: msgspec.msgpack.Decoder[M], frame: bytes) -> M:
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"message of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"undecodable message: {error}") from None

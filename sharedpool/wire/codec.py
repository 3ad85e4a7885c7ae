"""Bytes to messages and back: msgpack, validated by type; no pickle anywhere."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from sharedpool.errors import ProtocolError
from sharedpool.wire.desk import FromDesk, Moved, ToDesk
from sharedpool.wire.messages import Hello, ToBroker, ToWorker
from sharedpool.wire.reports import FromOperator, ToOperator

# The largest honest message is a RENEW with every lease of a big pool; anything longer is not ours.
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
    """Return the one frame or packet that carries `message`."""
    return _encoder.encode(message)


def decode_to_broker(frame: bytes) -> ToBroker | FromOperator:
    """Read a worker's or a command's message; raise `ProtocolError` for anything else."""
    return _decode(_to_broker, frame)


def decode_to_worker(frame: bytes) -> ToWorker:
    """Read a broker's message; raise `ProtocolError` for anything else."""
    return _decode(_to_worker, frame)


def decode_to_operator(frame: bytes) -> ToOperator:
    """Read a broker's answer to a command; raise `ProtocolError` for anything else."""
    return _decode(_to_operator, frame)


def decode_to_desk(packet: bytes) -> ToDesk:
    """Read what came to the desk; raise `ProtocolError` for anything else."""
    return _decode(_to_desk, packet)


def decode_from_desk(packet: bytes) -> FromDesk:
    """Read what the desk has sent; raise `ProtocolError` for anything else."""
    return _decode(_from_desk, packet)


def decode_moved(packet: bytes) -> Moved:
    """Read what came in the lane; raise `ProtocolError` for anything else."""
    return _decode(_moved, packet)


def hello_version(frame: bytes) -> int | None:
    """Return the protocol version of a frame that begins as a HELLO does, of whatever version; else None.

    So that a worker of another version can be told, in a REJECT, which no version changes.
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


def _decode(decoder: msgspec.msgpack.Decoder[M], frame: bytes) -> M:
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"message of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"undecodable message: {error}") from None

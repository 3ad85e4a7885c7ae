"""Bytes to messages and back: msgpack, validated by type; no pickle anywhere."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from sharedpool.errors import ProtocolError
from sharedpool.wire.messages import ToBroker, ToWorker

# The largest honest message is a RENEW with every lease of a big pool; anything longer is not ours.
MAX_FRAME_BYTES = 1 << 20

_encoder = msgspec.msgpack.Encoder()
_to_broker: msgspec.msgpack.Decoder[ToBroker] = msgspec.msgpack.Decoder(ToBroker)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)

M = TypeVar("M")


def encode(message: ToBroker | ToWorker) -> bytes:
    """Return the one frame that carries `message`."""
    return _encoder.encode(message)


def decode_to_broker(frame: bytes) -> ToBroker:
    """Read a worker's message; raise `ProtocolError` for anything else."""
    return _decode(_to_broker, frame)


def decode_to_worker(frame: bytes) -> ToWorker:
    """Read a broker's message; raise `ProtocolError` for anything else."""
    return _decode(_to_worker, frame)


def _decode(decoder: msgspec.msgpack.Decoder[M], frame: bytes) -> M:
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"message of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"undecodable message: {error}") from None

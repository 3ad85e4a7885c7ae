"""Bytes to messages and back: nothing but a message or a `ProtocolError` comes out."""

from __future__ import annotations

import contextlib
import operator
import pickle
from collections.abc import Callable
from typing import get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharedpool.errors import ProtocolError
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.buckets import BUCKETS
from sharedpool.wire.codec import (
    MAX_FRAME_BYTES,
    decode_to_broker,
    decode_to_operator,
    decode_to_worker,
    encode,
)
from sharedpool.wire.messages import (
    Confirm,
    Hello,
    Release,
    ReleaseReason,
    Renew,
    ToBroker,
    ToWorker,
)
from sharedpool.wire.reports import (
    MOST_LISTED,
    BackendActivity,
    FromOperator,
    LeaseLine,
    PoolReport,
    Report,
    SessionReport,
    ToOperator,
)
from sharedpool.wire.values import (
    NO_TOKEN,
    Backend,
    Histogram,
    Holder,
    LeaseReport,
    Phase,
    PoolSpec,
    Timings,
    Token,
)

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# msgpack carries 64 bits, and text that is valid UTF-8.
integers = st.integers(-(2**63), 2**64 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]))
tokens = st.builds(Token, integers, integers)
st.register_type_strategy(int, integers)
st.register_type_strategy(str, texts)
st.register_type_strategy(float, st.floats(allow_nan=False))
backends = st.builds(
    Backend, st.integers(-(2**31), 2**31 - 1), *[st.integers(-(2**63), 2**63 - 1)] * 2
)
st.register_type_strategy(Backend, backends)
orders = st.builds(
    Order, integers, st.sampled_from(OrderKind), texts, st.integers(0, 2**31 - 1), tokens
)
counts = st.integers(0, 2**63 - 1)
histograms = st.builds(Histogram, st.lists(counts, min_size=BUCKETS, max_size=BUCKETS), counts)
st.register_type_strategy(Histogram, histograms)
structs = (
    PoolSpec,
    LeaseReport,
    Holder,
    SessionReport,
    PoolReport,
    LeaseLine,
    BackendActivity,
    Timings,
)
for struct in structs:
    hints = {field.name: st.from_type(field.type) for field in msgspec.structs.fields(struct)}
    st.register_type_strategy(struct, st.builds(struct, **hints))


def messages_of(union: object) -> st.SearchStrategy[object]:
    kinds: list[st.SearchStrategy[object]] = [
        orders
        if message is Order
        else st.builds(
            message,
            **{field.name: st.from_type(field.type) for field in msgspec.structs.fields(message)},
        )
        for message in get_args(union)
    ]
    return st.one_of(kinds)


@unhurried
@given(message=messages_of(ToBroker | FromOperator))
def test_every_message_to_the_broker_survives_the_wire(message: ToBroker | FromOperator) -> None:
    again = decode_to_broker(encode(message))
    assert again == message
    assert type(again) is type(message)


@unhurried
@given(message=messages_of(ToWorker))
def test_every_message_to_a_worker_survives_the_wire(message: ToWorker) -> None:
    again = decode_to_worker(encode(message))
    assert again == message
    assert type(again) is type(message)


@unhurried
@given(message=messages_of(ToOperator))
def test_every_answer_to_a_command_survives_the_wire(message: ToOperator) -> None:
    again = decode_to_operator(encode(message))
    assert again == message
    assert type(again) is type(message)


def test_the_longest_list_of_leases_fits_into_a_frame() -> None:
    entry = "x" * 100  # as long as `callsite.shown_stack` makes it, as often as `capture` takes
    line = LeaseLine(
        Token(2**63, 2**63), "p" * 63, 2**22, "h" * 64, "t" * 100, "n" * 100, "being ended", 2**40,
        Backend(2**22, 2**60, 2**60), [entry] * 12,
    )  # fmt: skip
    report = Report(
        3, 1, 1, "a" * 107, 1, 1, MOST_LISTED, "connected", [], [], oldest=[line] * MOST_LISTED
    )
    assert decode_to_operator(encode(report)) == report


@pytest.mark.parametrize(
    "backend", [Backend(2**31), Backend(1, 2**63), Backend(1, 1, 2**64 - 1), Backend(-(2**31) - 1)]
)
def test_a_backend_that_no_server_can_have_is_refused(backend: Backend) -> None:
    """The broker asks PostgreSQL about it, together with others."""
    with pytest.raises(ProtocolError):
        decode_to_broker(encode(Confirm(Token(1, 1), backend)))


@pytest.mark.parametrize(
    "counts", [[1] * (BUCKETS - 1), [1] * (BUCKETS + 1), [*[1] * (BUCKETS - 1), -1], []]
)
def test_a_histogram_of_other_buckets_or_less_than_nothing_is_refused(counts: list[int]) -> None:
    good, bad = Histogram([0] * BUCKETS, 0), Histogram(counts, 1)
    with pytest.raises(ProtocolError):
        decode_to_broker(encode(Renew([], Token(1, 1), times=Timings(1, good, good, bad))))


def test_types_are_restored_not_just_values() -> None:
    report = LeaseReport(Token(3, 4), Phase.IDLE, 5, "t", Backend(1, 2, 3))
    hello = decode_to_broker(
        encode(Hello(1, 2, "h", "t", PoolSpec("p", 5, 60), [report], Token(3, 9)))
    )
    assert isinstance(hello, Hello)
    assert isinstance(hello.leases[0].token, Token)
    assert hello.leases[0].phase is Phase.IDLE
    release = decode_to_broker(encode(Release(Token(1, 1), True, ReleaseReason.RETURN_DUE)))
    assert isinstance(release, Release)
    assert release.reason is ReleaseReason.RETURN_DUE


DECODERS = [decode_to_broker, decode_to_operator, decode_to_worker]


@pytest.mark.parametrize("decode", DECODERS)
@unhurried
@given(frame=st.binary(max_size=200))
def test_garbage_is_a_protocol_error_or_a_message(
    decode: Callable[[bytes], object], frame: bytes
) -> None:
    with contextlib.suppress(ProtocolError):
        decode(frame)


json_like = st.recursive(
    st.none() | st.booleans() | integers | st.floats() | texts | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)
TAGS = [
    message.__struct_config__.tag
    for union in (ToBroker | FromOperator, ToWorker, ToOperator)
    for message in get_args(union)
]


@pytest.mark.parametrize("decode", DECODERS)
@unhurried
@given(fields=st.lists(json_like, max_size=8), tag=st.sampled_from(TAGS))
def test_well_tagged_messages_of_wrong_types_are_protocol_errors_or_messages(
    decode: Callable[[bytes], object], fields: list[object], tag: str
) -> None:
    with contextlib.suppress(ProtocolError):
        decode(msgspec.msgpack.encode([tag, *fields]))


@unhurried
@given(message=messages_of(ToBroker), cut=st.integers(0, 50), flip=st.integers(0, 255))
def test_a_damaged_message_is_a_protocol_error_or_another_message(
    message: ToBroker, cut: int, flip: int
) -> None:
    frame = bytearray(encode(message))
    frame[cut % len(frame)] ^= flip
    for damaged in (bytes(frame), bytes(frame[: cut % len(frame)])):
        with contextlib.suppress(ProtocolError):
            decode_to_broker(damaged)


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"not msgpack",
        encode(Renew([], NO_TOKEN)) + b"\0",
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode(["nonsense"]),
        msgspec.msgpack.encode(["acquire"]),
        msgspec.msgpack.encode(["acquire", "1", 0]),
        msgspec.msgpack.encode(["acquire", 1, 0.5]),
        msgspec.msgpack.encode(["release", [1], True, "taken"]),
        msgspec.msgpack.encode(["release", [1, 2], True, "because"]),
        msgspec.msgpack.encode({"type": "bye"}),
        b"\x91" * 100_000,
        pickle.dumps(Token(1, 2)),
    ],
)
def test_a_frame_without_a_message_is_a_protocol_error(
    decode: Callable[[bytes], object], frame: bytes
) -> None:
    with pytest.raises(ProtocolError):
        decode(frame)


def test_a_message_for_the_other_side_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        decode_to_worker(encode(Renew([], NO_TOKEN)))


def test_an_oversized_frame_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match=f"over the limit of {MAX_FRAME_BYTES}"):
        decode_to_broker(b"\x93" + bytes(MAX_FRAME_BYTES))


def test_the_heartbeat_of_a_big_pool_fits_a_frame() -> None:
    big = 2**53
    lease = LeaseReport(
        Token(big, big), Phase.CONNECTING, big, "ThreadPoolExecutor-0_0", Backend(2**22, big, big)
    )
    assert (
        len(encode(Renew([lease] * 5_000, Token(big, big), big, list(range(1_000)))))
        < MAX_FRAME_BYTES
    )


def test_a_backend_is_the_same_however_it_is_reached() -> None:
    one, other = Backend(1, 2, 3), Backend(1, 2, 3, True, "app")
    assert one == other
    assert not operator.ne(one, other)
    assert hash(one) == hash(other)
    assert one != Backend(1, 2, 4)
    report = LeaseReport(Token(3, 4), Phase.IDLE, 5, "t", other)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=LeaseReport).backend.direct  # type: ignore[union-attr]

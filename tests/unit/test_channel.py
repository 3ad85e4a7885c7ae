"""Several sessions over one connection to the broker."""

import pytest

from sharedpool.wire.channel import (
    PROCESS_PREFIX,
    add_channel,
    channel_number,
    from_session,
    split_channel,
    to_session,
)

PROCESS = PROCESS_PREFIX + b"123456789012345"


@pytest.mark.parametrize("number", [1, 2, 300, 2**32 - 1])
def test_a_channels_frame_names_its_session_both_ways(number: int) -> None:
    channel = channel_number(number)
    session, body = to_session(PROCESS, add_channel(channel, b"what is said"))
    assert (session, body) == (PROCESS + channel, b"what is said")
    routing_id, frame = from_session(session, b"the answer")
    assert routing_id == PROCESS
    assert split_channel(frame) == (channel, b"the answer")


@pytest.mark.parametrize(
    "routing_id", [b"c" + PROCESS[1:], b"p", b"pool", PROCESS + b"x", b"\0abc"]
)
def test_a_peer_without_a_process_has_one_session(routing_id: bytes) -> None:
    assert to_session(routing_id, b"a question") == (routing_id, b"a question")
    if len(routing_id) <= 16:
        assert from_session(routing_id, b"the answer") == (routing_id, b"the answer")


def test_a_frame_that_is_too_short_is_no_message() -> None:
    session, body = to_session(PROCESS, b"x")
    assert (session, body) == (PROCESS + b"x", b"")
    assert from_session(session, b"no") == (PROCESS, b"xno")

"""Streaming text: whole characters, no stop strings, and in the end exactly the decoded text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar.text import TextStream


def decode_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=40))
def test_pieces_join_to_the_whole_text_and_never_split_a_character(text):
    stream = TextStream(decode_bytes)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == stream.text == text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    stream, streamed = TextStream(decode_bytes, stops), ""
    for byte in text.encode():
        streamed += stream.push(byte)
        if stream.stopped:
            break
    streamed += stream.finish()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert streamed == text
        assert not stream.stopped
        return
    seen = text[: min(ends)]  # tokens come one by one: the stop string that is complete first ends the text
    assert streamed == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    assert stream.stopped


def test_what_may_be_a_stop_string_is_held_back():
    stream = TextStream(decode_bytes, ["END"])
    assert [stream.push(byte) for byte in b"xENxEND"] == ["x", "", "", "ENx", "", "", ""]
    assert stream.stopped
    assert stream.text == "xENx"


def test_an_incomplete_character_at_the_end_is_still_shown():
    stream = TextStream(decode_bytes)
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("stops", [(), ("",)])
def test_no_stop_strings(stops):
    stream = TextStream(decode_bytes, stops)
    assert stream.push(97) == "a"
    assert not stream.stopped

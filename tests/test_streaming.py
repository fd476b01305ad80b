"""Stop strings and streams on a scripted engine: what is shown never depends on how tokens cut the text."""

import asyncio
import itertools
import re
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit import SamplingParams, Stream
from kbit.generation import AsyncStream, StopStrings

SMALL = st.text(alphabet="abc", min_size=1, max_size=4)


def cut_by_definition(text, stops):
    """The text before the stop string that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        begins = [end - len(s) for s in stops if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)], True
    return text, False


@given(st.lists(SMALL, max_size=3), st.lists(st.text(alphabet="abc", max_size=5), max_size=12))
def test_stop_strings_equal_the_definition_however_the_text_is_cut(stops, pieces):
    cutter = StopStrings(stops)
    shown, whole = "", "".join(pieces)
    for piece in pieces:
        shown += cutter.push(piece)
        expected, hit = cut_by_definition(whole, stops)
        assert expected.startswith(shown)  # nothing leaks, ever
    shown += cutter.finish()
    expected, hit = cut_by_definition(whole, stops)
    assert (shown, cutter.hit) == (expected, hit)


@given(st.lists(SMALL, min_size=1, max_size=3), st.text(alphabet="abc", max_size=12))
def test_text_is_held_back_no_longer_than_needed(stops, text):
    cutter = StopStrings(stops)
    shown = "".join(cutter.push(c) for c in text)
    if not cutter.hit:
        held = text[len(shown) :]
        assert not held or any(s.startswith(held) for s in stops)


class Script:
    """A Request that hands out prepared batches of tokens."""

    def __init__(self, batches, finish_reason="length", error=None):
        self.batches = list(batches)
        self.error = error
        self.ended = finish_reason
        self.finish_reason = None
        self.cancelled = False
        self.prompt_seconds = self.decode_seconds = 0.5

    def wait(self, timeout=0.05):
        if self.cancelled:
            self.finish_reason = "cancelled"
            return None
        if self.batches:
            ids = self.batches.pop(0)
            return [SimpleNamespace(id=i, logprob=-1.0, top=[(i, -1.0)]) for i in ids]
        if self.error:
            raise self.error
        self.finish_reason = self.ended
        return None

    def cancel(self):
        self.cancelled = True


class Bytes:
    """A decoder whose tokens are bytes: characters come in parts."""

    def __init__(self):
        self.data = b""

    def push(self, token_id):
        self.data += bytes([token_id])
        try:
            text = self.data.decode()
        except UnicodeDecodeError:
            return ""
        self.data = b""
        return text

    def finish(self):
        return self.data.decode(errors="replace")


def make(text, *, cuts=(), eos=(), **options):
    script = {k: options.pop(k) for k in ("finish_reason", "error") if k in options}
    data = text.encode() if isinstance(text, str) else text
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    batches = [data[a:b] for a, b in itertools.pairwise(edges)]
    request = Script(batches, **script)
    return request, Stream(request, Bytes(), SamplingParams(**options), eos, 3)


@given(st.text(min_size=1, max_size=20), st.lists(st.integers(0, 99), max_size=8))
def test_pieces_join_to_the_text_and_are_whole_characters(text, cuts):
    _, stream = make(text, cuts=cuts)
    pieces = list(stream)
    assert "".join(pieces) == stream.text == text
    assert "\ufffd" not in stream.text or "\ufffd" in text
    assert stream.token_ids == list(text.encode())
    assert stream.finish_reason == "length"


def test_stop_string_across_batches_cancels_and_is_cut():
    request, stream = make("one STOP two", cuts=range(12), stop="STOP")
    done = stream.result()
    assert (done.text, done.finish_reason) == ("one ", "stop")
    assert bytes(done.token_ids) == b"one STOP"
    assert request.cancelled


def test_stop_string_completed_by_the_flush():
    _, stream = make(b"a" + "é".encode()[:1], stop="\ufffd")
    done = stream.result()
    assert (done.text, done.finish_reason) == ("a", "stop")


def test_eos_is_counted_and_not_shown():
    _, stream = make(b"ab\x00", eos=[0], finish_reason="stop")
    done = stream.result()
    assert (done.text, done.token_ids, done.finish_reason) == ("ab", [97, 98, 0], "stop")


def test_logprobs_only_on_request():
    assert make("ab")[1].result().logprobs is None
    logprobs = make("ab", logprobs=1)[1].result().logprobs
    assert [(p.id, p.top) for p in logprobs] == [(97, [(97, -1.0)]), (98, [(98, -1.0)])]


def test_error_cancels_and_ends_the_stream():
    request, stream = make("ab", error=KeyboardInterrupt())
    assert next(stream) == "ab"
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert request.cancelled
    assert list(stream) == []
    assert stream.finish_reason == "cancelled"


def test_leaving_with_or_dropping_cancels():
    request, stream = make("abc", cuts=[1, 2])
    with stream:
        assert next(stream) == "a"
    assert request.cancelled
    assert stream.finish_reason == "cancelled"
    request, stream = make("abc")
    del stream
    assert request.cancelled


def test_a_finished_stream_stays_finished():
    _request, stream = make("abc")
    assert stream.result().text == "abc"
    stream.close()
    assert stream.finish_reason == "length"
    assert stream.result().text == "abc"
    assert re.match("abc", str(stream.result()))


# asyncio


def test_async_pieces_equal_the_text():
    async def read():
        stream = AsyncStream(lambda: make("héllo", cuts=range(6))[1])
        pieces = [piece async for piece in stream]
        return pieces, stream.stream.finish_reason

    assert asyncio.run(read()) == (["h", "é", "l", "l", "o"], "length")


def test_async_errors_arrive():
    async def read():
        return await AsyncStream(lambda: make("ab", error=ValueError("engine"))[1]).result()

    with pytest.raises(ValueError, match="engine"):
        asyncio.run(read())


def test_async_cancellation_reaches_the_request():
    request, stream = make("ab")
    forever = threading.Event()
    request.wait = lambda timeout=0.05: forever.wait(timeout) or (None if request.cancelled else [])

    async def read():
        task = asyncio.ensure_future(AsyncStream(lambda: stream).result())
        await asyncio.sleep(0.1)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read())
    assert request.cancelled


def test_async_close_before_the_end():
    request, stream = make("abcdef", cuts=range(6))

    async def read():
        async with AsyncStream(lambda: stream) as pieces:
            async for piece in pieces:
                return piece

    assert asyncio.run(read()) == "a"
    assert request.cancelled or stream.finish_reason == "length"

"""From the engine's tokens to text: stop strings, streaming, batches, asyncio."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from kbit.sampling import Completion, SamplingParams, Timings, TokenLogprob

if TYPE_CHECKING:
    import asyncio

    from kbit._core import Request
    from kbit.text import StreamDecoder

WAIT_SECONDS = 0.05
"""Longest sleep in the engine before Python looks at signals."""

AT_ONCE = 1024
"""Requests of one list that the engine has at a time: far more than run, far fewer than may wait."""


class StopStrings:
    """Cuts a text that comes in pieces at the first stop string, without ever letting a part of one out.

    The result does not depend on how the text was cut into pieces: the stop string that is complete
    first ends it, the longer one if two are complete at the same character.

    >>> stops = StopStrings(["END"])
    >>> stops.push("the E"), stops.push("Nough"), stops.push(" EN"), stops.push("D of")
    ('the ', 'ENough', ' ', '')
    >>> stops.hit
    True
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """The text that is safe to show after `piece`; nothing once a stop string was hit."""
        if self.hit:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.hit, self._held = True, ""
            return text[: min(ends)[1]]
        safe = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back, when the text ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Stream(Iterator[str]):
    """The pieces of a text as they are generated; `text`, `token_ids` and the rest grow with them.

    Closing it, leaving its `with` block or dropping it ends the generation. Without a decoder there is no text.
    """

    def __init__(
        self,
        request: Request,
        decoder: StreamDecoder | None,
        params: SamplingParams,
        eos: Sequence[int],
        prompt_tokens: int,
    ) -> None:
        self._request = request
        self._decoder = decoder
        self._stops = StopStrings(params.stop)
        self._eos = frozenset(eos)
        self._prompt_tokens = prompt_tokens
        self.text = ""
        """The text so far."""
        self.token_ids: list[int] = []
        """The ids so far."""
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        """One per id, if they were asked for."""
        self.finish_reason: str | None = None
        """`stop`, `length`, `context` or `cancelled` at the end, None before."""

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        while self.finish_reason is None:
            if piece := self._step():
                self.text += piece
                return piece
        raise StopIteration

    def _step(self) -> str:
        """Waits for tokens and turns them into text, which may be empty."""
        try:
            tokens = self._request.wait(WAIT_SECONDS)
        except BaseException:  # a failure of the engine or Ctrl-C: nobody will read on
            self.close()
            raise
        if tokens is None:
            piece = self._stops.push(self._decoder.finish()) if self._decoder else ""
            piece += self._stops.finish()
            self.finish_reason = "stop" if self._stops.hit else self._request.finish_reason
            return piece
        piece = ""
        for token in tokens:
            self.token_ids.append(token.id)
            if self.logprobs is not None and token.logprob is not None:
                self.logprobs.append(TokenLogprob(token.id, token.logprob, token.top))
            if token.id in self._eos or self._decoder is None:
                continue
            piece += self._stops.push(self._decoder.push(token.id))
            if self._stops.hit:
                self._request.cancel()
                self.finish_reason = "stop"
                break
        return piece

    def close(self) -> None:
        """End the generation; its memory is freed. Safe from any thread, and twice."""
        self._request.cancel()
        if self.finish_reason is None:
            self.finish_reason = "cancelled"

    def result(self) -> Completion:
        """Runs to the end and returns everything at once."""
        for _ in self:
            pass
        assert self.finish_reason is not None
        return Completion(
            self.text, self.token_ids, self.finish_reason, self.timings, self.logprobs
        )

    @property
    def timings(self) -> Timings:
        """Where the time went so far."""
        request = self._request
        return Timings(
            self._prompt_tokens,
            len(self.token_ids),
            request.prompt_seconds,
            request.decode_seconds,
        )

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # __init__ may have failed
            if self.finish_reason is None:
                self._request.cancel()


class AsyncStream(AsyncIterator[str]):
    """A `Stream` for asyncio: `async for piece in stream`. Cancelling the task ends the generation.

    A thread of its own reads the engine's events, so that no executor fills up and the event loop never waits.
    """

    def __init__(self, start: Callable[[], Stream]) -> None:
        import asyncio  # 50 ms, for those who use it

        self._start = start
        self._stream: Stream | None = None
        self._events: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._done = False

    @property
    def stream(self) -> Stream:
        """The stream underneath, with `text`, `token_ids` and the rest.

        Raises:
            RuntimeError: Nothing was read from it yet.
        """
        if self._stream is None:
            raise RuntimeError("the stream has not started: read a piece first")
        return self._stream

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        import asyncio

        if self._stream is None:
            self._stream = self._start()
            relay = (self._stream, self._events, asyncio.get_running_loop())
            threading.Thread(target=_relay, args=relay, name="kbit-stream", daemon=True).start()
        elif self._done:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except BaseException:  # the task was cancelled
            self._stream.close()
            raise
        if isinstance(event, str):
            return event
        self._done = True
        raise event or StopAsyncIteration

    async def aclose(self) -> None:
        """End the generation."""
        if self._stream is not None:
            self._stream.close()

    async def result(self) -> Completion:
        """Runs to the end and returns everything at once."""
        async with self:
            async for _ in self:
                pass
            return self.stream.result()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        stream = getattr(self, "_stream", None)
        if stream is not None and stream.finish_reason is None:
            stream.close()


def _relay(
    stream: Stream,
    events: asyncio.Queue[str | BaseException | None],
    loop: asyncio.AbstractEventLoop,
) -> None:
    """Hands the pieces of `stream` to the event loop, then None or the error that ended it."""
    end: BaseException | None = None
    try:
        for piece in stream:
            loop.call_soon_threadsafe(events.put_nowait, piece)
    except BaseException as error:
        end = error
    with suppress(RuntimeError):  # the loop is closed: nobody listens
        loop.call_soon_threadsafe(events.put_nowait, end)


def finish_all(starts: Iterable[Callable[[], Stream]], at_once: int = AT_ONCE) -> list[Completion]:
    """Completions, in order, of requests that run side by side; one failure or Ctrl-C ends them all.

    Args:
        starts: Each submits a request.
        at_once: Most requests that are submitted and not finished.
    """
    done: list[Completion] = []
    under_way: deque[Stream] = deque()
    try:
        for start in starts:
            if len(under_way) >= at_once:
                done.append(under_way[0].result())
                under_way.popleft()
            under_way.append(start())
        return done + [stream.result() for stream in under_way]
    finally:
        for stream in under_way:
            stream.close()

"""What a chat template may cost: steps, bytes and seconds, counted before they are spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from jinja2 import Undefined

from kbit.text.kinds import TemplateError, is_dict

MAX_STEPS = 400_000
"""A long conversation (2,000 messages) takes 140,000; a step is at most about a microsecond."""
MAX_SECONDS = 0.45
"""Of the thread's own time, for parsing and for rendering each: the error is there within a second. Steps run out first
wherever a processor is not much slower than today's."""
MAX_TEXT = 8 << 20
"""Bytes of the output and of any one value, a character counting one byte in ASCII text and four in any other."""
MAX_MEMORY = 40 << 20
"""Bytes of everything a rendering makes; with the source and its syntax tree it stays under 64 MiB."""
MAX_NESTING = 100
"""Depth of blocks and brackets in the source, and of lists in lists in a value."""


def text_bytes(text: str) -> int:
    """Bytes that `text` is counted with: an upper bound of what CPython uses."""
    return len(text) if text.isascii() else 4 * len(text)


class Budget:
    """What is left of the limits. Every method raises `TemplateError` instead of going below zero."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._look = MAX_STEPS
        self._memory = MAX_MEMORY
        self._end = time.thread_time() + MAX_SECONDS
        # Lists may hold the same list twice, so what a value prints or compares to is not bounded by what it takes:
        # weight and depth of every container, which is kept alive so that its id stays its own.
        self._containers: dict[int, tuple[Any, int, int]] = {}

    def step(self, count: int = 1) -> None:
        """Count work; a step is about a microsecond."""
        self._steps -= count
        if self._steps < self._look:
            self._look = self._steps - 1000
            if self._steps < 0:
                raise TemplateError(f"the template takes more than {MAX_STEPS} steps")
            if time.thread_time() > self._end:
                raise TemplateError(f"the template takes longer than {MAX_SECONDS:g} s")

    def take(self, size: int) -> None:
        """Count `size` bytes that are about to be made."""
        if size > MAX_TEXT:
            raise TemplateError(
                f"the template makes a value of {size} bytes; at most {MAX_TEXT} are allowed"
            )
        self._memory -= size
        if self._memory < 0:
            raise TemplateError(f"the template uses more than {MAX_MEMORY} bytes")
        self.step(1 + (size >> 12))

    def give(self, size: int) -> None:
        """Count `size` bytes as free again."""
        self._memory += size

    def weight(self, value: Any) -> int:
        """How much printing, comparing or hashing `value` can cost: characters and items, repeated ones each time."""
        return self._measure(value)[0]

    def depth(self, value: Any) -> int:
        """How deep lists stand in lists in `value`."""
        return self._measure(value)[1]

    def _measure(self, value: Any) -> tuple[int, int]:
        kind = cast("type[Any]", type(value))
        if kind is str:
            return len(value) + 2, 0
        if value is None or kind in (bool, float) or isinstance(value, Undefined):
            return 24, 0
        if kind is int:
            return 8 + value.bit_length() // 3, 0
        known = self._containers.get(id(value))
        if known is not None and known[0] is value:
            return known[1], known[2]
        if kind in (list, tuple, dict):
            return self._measure_items(value)
        if kind is range:
            return 32, 0
        raise TemplateError(f"a template puts a {kind_of(value)} where data is needed")

    def _measure_items(self, value: Any) -> tuple[int, int]:
        weight, depth = 2, 0
        items: Any = [*value, *value.values()] if is_dict(value) else value
        for item in items:
            item_weight, item_depth = self._measure(item)
            weight += item_weight + 2
            depth = max(depth, item_depth)
        self.step(1 + len(value) // 2)
        if weight > MAX_TEXT:
            raise TemplateError(
                f"the template makes a value of {weight} characters and items; at most {MAX_TEXT} are allowed"
            )
        if depth >= MAX_NESTING:
            raise TemplateError(f"the template nests lists more than {MAX_NESTING} deep")
        return weight, depth + 1

    def made(self, value: Any) -> Any:
        """Register a new list, tuple or dict of registered ones; its bytes were taken already. Returns it."""
        weight, depth = self._measure_items(value)
        self._containers[id(value)] = (value, weight, depth)
        return value

    def view(self, view: Any, of: Mapping[Any, Any]) -> Any:
        """Register a view of a dict."""
        weight, depth = self._measure(of)
        self._containers[id(view)] = (view, weight, depth)
        return view

    def container(self, value: Any) -> Any:
        """Take the bytes of a new list, tuple or dict and register it. Returns it."""
        self.take(64 + len(value) * (120 if isinstance(value, dict) else 16))
        return self.made(value)

    def plain(self, value: Any, guard: Callable[[str], str] = str, depth: int = 0) -> Any:
        """A copy of JSON-like data made of exactly str, int, float, bool, None, list, tuple and dict.

        Args:
            value: What the caller gave.
            guard: Applied to every string that is a value (not to keys).
            depth: How deep in the data this is.

        Raises:
            TypeError: Anything else in it.
        """
        if depth > MAX_NESTING:
            raise TemplateError(f"the conversation nests deeper than {MAX_NESTING}")
        if value is None or type(value) in (int, float, bool):
            return value
        if isinstance(value, str):  # a subclass (an enum) may carry anything
            return guard(str.__str__(value))
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, Mapping):
            pairs = cast("Mapping[Any, Any]", value).items()
            made: Any = {self.plain(k): self.plain(v, guard, depth + 1) for k, v in pairs}
        elif isinstance(value, list | tuple):
            made = [self.plain(item, guard, depth + 1) for item in cast("Sequence[Any]", value)]
            if isinstance(value, tuple):
                made = tuple(made)
        else:
            raise TypeError(f"a chat template takes JSON-like data, not a {type(value).__name__}")
        return self.container(made)


def kind_of(value: Any) -> str:
    """What a value is called in an error."""
    return "undefined value" if isinstance(value, Undefined) else type(value).__name__

"""A progress line on stderr for what takes longer than a second; silent when nobody watches."""

from __future__ import annotations

import sys
import time

SHOW_AFTER_SECONDS = 1.0
REDRAW_SECONDS = 0.1
WIDTH = 24


class Progress:
    """`with Progress("quantising", total) as p: ... p.advance(amount)`; draws only on a terminal.

    Args:
        label: What is going on.
        total: Amount that is the whole; 0 shows no fraction.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._amount = 0
        self._begin = self._drawn = time.monotonic()
        self._visible = False
        self._on = sys.stderr.isatty()

    def advance(self, amount: int = 1) -> None:
        """Note that `amount` more is done."""
        self._amount += amount
        now = time.monotonic()
        late = now - self._begin >= SHOW_AFTER_SECONDS and now - self._drawn >= REDRAW_SECONDS
        if self._on and late:
            self._drawn, self._visible = now, True
            fraction = min(self._amount / self._total, 1.0) if self._total else 0.0
            filled = round(fraction * WIDTH)
            left = (now - self._begin) * (1 / fraction - 1) if fraction else 0.0
            bar = "#" * filled + "." * (WIDTH - filled)
            line = f"\r{self._label} [{bar}] {fraction:4.0%} {left:4.0f} s left "
            print(line, end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._visible:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

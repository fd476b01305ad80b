"""Which regular expressions a tokenizer file may carry.

`tokenizers` matches them with a backtracking engine, so a pattern decides what a text costs. A
pattern passes if a match that begins at one place looks at no more than a fixed number of ways
through one run of text: time is then at most quadratic in the longest run. Published tokenizers pass;
what a pattern is refused for is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from kbit._core import ModelFormatError

MAX_LENGTH = 8192
MAX_WAYS = 4096
MAX_DEPTH = 32
MAX_REPEAT = 10_000
_QUANTIFIER = re.compile(r"(?:([*+?])|\{(\d*)(,?)(\d*)\})[?+]?")
_GROUP = re.compile(r"\?(?:(#)|([imx]*(?:-[imx]+)?):|([imx]+)\)|(=|!|<=|<!|>)|<[A-Za-z_]\w*>)")


class Shape(NamedTuple):
    """What a part of a pattern can match.

    Attributes:
        least: Fewest characters.
        most: Most characters; None for no bound.
        runs: Repetitions without bound, one after the other.
        ways: Ways to match one stretch of text, apart from those repetitions.
        fails: It may fail although it matches nothing (a look at the surroundings).
    """

    least: int = 0
    most: int | None = 0
    runs: int = 0
    ways: int = 1
    fails: bool = False


def check(pattern: str, where: str) -> None:
    """Refuse a pattern that may take more than quadratic time.

    Raises:
        ModelFormatError: It may, or it cannot be read.
    """
    if len(pattern) > MAX_LENGTH:
        raise ModelFormatError(
            f"{where}: a pattern of {len(pattern)} characters; at most {MAX_LENGTH} are read"
        )
    try:
        _Reader(pattern).read()
    except _Refused as error:
        raise ModelFormatError(f"{where}: the pattern {pattern!r:.120} {error}") from None


class _Refused(Exception):
    """Why a pattern is refused."""


class _Reader:
    """Reads a pattern in Oniguruma's syntax, as far as its cost goes."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at: int = 0
        self._depth: int = 0

    def read(self) -> Shape:
        shape = self._alternatives()
        if self._at < len(self._text):
            raise _Refused(f"has an unmatched ')' at {self._at}")
        return shape

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _alternatives(self) -> Shape:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(f"nests deeper than {MAX_DEPTH}")
        branches = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence())
        self._depth -= 1
        tops = [branch.most for branch in branches if branch.most is not None]
        return Shape(
            min(branch.least for branch in branches), max(tops) if len(tops) == len(branches) else None,
            max(branch.runs for branch in branches), sum(branch.ways for branch in branches),
            any(branch.fails for branch in branches),
        )  # fmt: skip

    def _sequence(self) -> Shape:
        parts: list[Shape] = []
        while self._peek() not in ("", "|", ")"):
            part = self._quantified(self._atom())
            if part is not None:
                parts.append(part)
        runs, ways, follows = 0, 1, False
        for part in reversed(parts):
            if follows:  # what comes later can fail, so every way through this part may be tried
                runs += part.runs
                ways *= part.ways
                if runs > 1:
                    raise _Refused(
                        "has two repetitions without bound before something that may fail"
                    )
                if ways > MAX_WAYS:
                    raise _Refused(f"can match one text in more than {MAX_WAYS} ways")
            follows = follows or part.least > 0 or part.fails
        tops = [part.most for part in parts if part.most is not None]
        return Shape(
            sum(part.least for part in parts), sum(tops) if len(tops) == len(parts) else None,
            sum(part.runs for part in parts), _product(part.ways for part in parts), any(part.fails for part in parts),
        )  # fmt: skip

    def _quantified(self, atom: Shape | None) -> Shape | None:
        while match := _QUANTIFIER.match(self._text, self._at):
            sign, low, comma, high = match.groups()
            if not sign and not low and not high:
                break  # a brace that is only a brace
            if atom is None:
                raise _Refused(f"has a quantifier without anything before it at {self._at}")
            self._at = match.end()
            least = int(low or 0) if not sign else int(sign == "+")
            most = (
                None
                if sign in ("*", "+") or (comma and not high)
                else 1
                if sign
                else int(high or low)
            )
            if max(least, most or 0) * (atom.most or 1) > MAX_REPEAT:
                raise _Refused(f"repeats to more than {MAX_REPEAT} characters")
            atom = self._repeated(atom, least, most)
        return atom

    def _repeated(self, atom: Shape, least: int, most: int | None) -> Shape:
        fixed = atom.least == atom.most and atom.ways == 1
        if most is None or most > 1:
            if atom.runs:
                raise _Refused("repeats a repetition without bound")
            if not fixed or (most is None and not atom.most):
                raise _Refused("repeats a group that can match in more than one way")
        if most is None:
            return Shape(atom.least * least, None, 1, 1, atom.fails)
        top = None if atom.most is None else atom.most * most
        return Shape(
            atom.least * least,
            top,
            atom.runs,
            max(atom.ways, 1) * max(1, most - least + 1),
            atom.fails,
        )

    def _atom(self) -> Shape | None:
        char = self._text[self._at]
        self._at += 1
        if char == "(":
            return self._group()
        if char == "[":
            self._class()
            return Shape(1, 1)
        if char == "\\":
            return self._escape()
        if char in "^$":
            return Shape(fails=True)
        if char in "*+?":
            raise _Refused(f"has a quantifier without anything before it at {self._at - 1}")
        return Shape(1, 1)

    def _escape(self) -> Shape:
        char = self._peek()
        self._at += 1
        if not char:
            raise _Refused("ends with a backslash")
        if char in "pP" and self._peek() == "{":
            end = self._text.find("}", self._at)
            if end < 0:
                raise _Refused("has a property without an end")
            self._at = end + 1
        elif char in "xu" and (
            match := re.compile(r"\{[0-9a-fA-F]{1,8}\}|[0-9a-fA-F]{1,4}").match(
                self._text, self._at
            )
        ):
            self._at = match.end()
        elif char in "bBAzZG":
            return Shape(fails=True)
        elif char in "123456789kgKXRyY":
            raise _Refused(f"uses \\{char}, which kbit does not bound")
        return Shape(1, 1)

    def _group(self) -> Shape | None:
        look = False
        if self._peek() == "?":
            match = _GROUP.match(self._text, self._at)
            if match is None:
                raise _Refused(f"has a group that kbit does not bound at {self._at}")
            comment, _, switch, sign = match.groups()
            self._at = match.end()
            if comment:
                end = self._text.find(")", self._at)
                self._at = len(self._text) if end < 0 else end + 1
                return None
            if switch:
                return None
            look = sign is not None and sign != ">"
        elif self._peek() == "*":
            raise _Refused("calls out of the pattern")
        inner = self._alternatives()
        if self._peek() != ")":
            raise _Refused("has an unmatched '('")
        self._at += 1
        return Shape(0, 0, inner.runs, inner.ways, True) if look else inner

    def _class(self) -> None:
        depth = 1
        start = True
        self._at += self._peek() == "^"
        while depth:
            char = self._peek()
            if not char:
                raise _Refused("has a '[' without an end")
            self._at += 2 if char == "\\" else 1
            if char == "[":
                depth += 1
                self._at += self._peek() == "^"
                start = True
                continue
            if char == "]" and not start:
                depth -= 1
            start = False


def _product(values: Iterable[int]) -> int:
    product = 1
    for value in values:
        product *= value
        if product > MAX_WAYS:
            raise _Refused(f"can match one text in more than {MAX_WAYS} ways")
    return product

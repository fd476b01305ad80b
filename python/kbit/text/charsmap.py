"""SentencePiece's compiled normalisation rules: a trie of texts and what they become."""

from __future__ import annotations

import struct

from kbit._core import ModelFormatError

MAX_REPLACEMENT = 1024
"""Longest replacement, in bytes; NFKC's longest is 33."""
_MEMO = 1 << 16


class Charsmap:
    """Rules "these bytes become those", the longest match first.

    The blob is the size of a double-array trie (u32), the trie (u32 units of darts-clone), and
    replacements that end with a zero byte. Nothing in it is trusted: positions outside it match nothing.

    Raises:
        ModelFormatError: The blob is cut off.
    """

    def __init__(self, blob: bytes) -> None:
        if len(blob) < 4:
            raise ModelFormatError(
                f"tokenizer: the normalisation rules have {len(blob)} bytes, fewer than their size field"
            )
        (size,) = struct.unpack_from("<I", blob)
        if size % 4 or size + 4 > len(blob):
            raise ModelFormatError(
                f"tokenizer: the normalisation rules say {size} bytes of trie and hold {len(blob) - 4}"
            )
        self._units = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self._pool = blob[4 + size :]
        self._memo: dict[str, bool] = {}

    def longest(self) -> int:
        """Length of the longest replacement, in bytes."""
        return max(map(len, self._pool.split(b"\0")))

    def match(self, text: str, at: int) -> tuple[int, str] | None:
        """The end of the longest rule that matches at `at`, and what it becomes."""
        pair = text[at : at + 2]
        alive = self._memo.get(pair)
        if alive is None:
            alive = self._walk(pair)[1]
            if len(self._memo) < _MEMO:
                self._memo[pair] = alive
        if not alive:
            return None
        found = self._walk(text[at : at + 32])[0]
        return None if found is None else (at + found[0], found[1])

    def _walk(self, text: str) -> tuple[tuple[int, str] | None, bool]:
        """The longest match at the start of `text` as (characters, replacement), and whether more text could match."""
        units = self._units
        count = len(units)
        found: tuple[int, str] | None = None
        if not count:
            return None, False
        node = _offset(units[0])
        for length, char in enumerate(text, 1):
            for byte in char.encode():
                node ^= byte
                if node >= count:
                    return found, found is not None
                unit = units[node]
                if unit & 0x800000FF != byte:
                    return found, found is not None
                node ^= _offset(unit)
            if unit & 0x100:  # pyright: ignore[reportPossiblyUnboundVariable]  a character has at least one byte
                if node >= count:
                    return found, found is not None
                found = length, self._replacement(units[node] & 0x7FFFFFFF)
        return found, True

    def _replacement(self, start: int) -> str:
        end = self._pool.find(b"\0", start, start + MAX_REPLACEMENT)
        if start >= len(self._pool) or end < 0:
            raise ModelFormatError(
                f"tokenizer: a normalisation rule has no replacement of at most {MAX_REPLACEMENT} bytes"
            )
        return self._pool[start:end].decode("utf-8", "replace")


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)

"""Text from token ids as they come."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer


class StreamDecoder:
    """Turns ids into pieces of text; the pieces concatenated are `Tokenizer.decode` of all ids.

    A character whose bytes are spread over several tokens is handed out with its last byte; bytes that can no longer
    become a character turn into U+FFFD.

    Args:
        tokenizer: What the ids mean.
        special: Control tokens give their text instead of nothing.
        continues: The ids go on from others: what is dropped at the start of a text is kept.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, special: bool = False, continues: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = not continues
        self._strip_char, self._strip_left = tokenizer.pieces.strip
        if continues:
            self._strip_left = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often one word and sometimes nothing.

        Raises:
            ValueError: A negative id.
        """
        data = self._tokenizer.token_bytes(token_id, special=self._special, first=self._first)
        if data is None:
            return ""
        self._first = False
        return self._stripped(self._utf8.decode(data))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never became whole."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip_char:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text

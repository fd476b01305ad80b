"""What one token is worth in bytes: the decoder part of a tokenizer, one token at a time.

Every decoder that language models use works token by token, apart from what happens at the very start of a text. So a
token is a byte string, decoding is concatenation, and a stream of tokens decodes to the same text as the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kbit._core import UnsupportedModelError

SPACE = "\u2581"
"""The character that SentencePiece writes for a space."""

Step = Callable[[str], str]


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character of each byte: bytes that print stand for themselves, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(rest)
    }


_BYTE_OF = {ord(char): byte for byte, char in byte_alphabet().items()}
_UNBYTES = str.maketrans({char: chr(byte) for char, byte in _BYTE_OF.items()})


def from_byte_level(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary; a token outside the alphabet is its own UTF-8."""
    if all(ord(char) in _BYTE_OF for char in token):
        return token.translate(_UNBYTES).encode("latin-1")
    return token.encode()


def byte_of(token: str) -> int | None:
    """The byte that a fallback token such as ``<0x0A>`` stands for; None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


@dataclass(frozen=True)
class Pieces:
    """How tokens become bytes.

    Attributes:
        byte_level: Tokens are written in GPT-2's byte alphabet.
        byte_fallback: Tokens such as ``<0x0A>`` are single bytes.
        steps: Replacements in a token's text, in order.
        first: As `steps`, for the first token of a text.
        strip: A character, and how many of it are dropped at the start of a text.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    steps: tuple[Step, ...] = ()
    first: tuple[Step, ...] | None = None
    strip: tuple[str, int] = (" ", 0)

    def of(self, token: str, *, first: bool) -> bytes:
        """Bytes of `token`, which is or is not the first of its text."""
        if self.byte_fallback and (byte := byte_of(token)) is not None:
            return bytes([byte])
        for step in self.steps if self.first is None or not first else self.first:
            token = step(token)
        return from_byte_level(token) if self.byte_level else token.encode()


def spaces(token: str) -> str:
    """SentencePiece's spaces written as spaces."""
    return token.replace(SPACE, " ")


def from_json(decoder: Any) -> Pieces:
    """The decoder of a tokenizer.json (already checked to be an object or None).

    Raises:
        UnsupportedModelError: A decoder that does not work token by token.
    """
    if decoder is None:
        # What `tokenizers` does without a decoder: tokens joined by spaces.
        return Pieces(steps=(lambda token: " " + token,), first=())
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    byte_level = byte_fallback = fused = False
    steps: list[Step] = []
    first: list[Step] = []
    strip = (" ", 0)
    for part in parts:
        kind = part.get("type")
        step: Step | None = None
        if kind == "ByteLevel":
            byte_level = True
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif (
            kind == "Replace"
            and isinstance(part.get("pattern", {}).get("String"), str)
            and not fused
        ):
            step = _replace(part["pattern"]["String"], str(part["content"]))
        elif kind == "Metaspace":
            mark = str(part.get("replacement", SPACE))
            steps.append(_replace(mark, " "))
            keep = part.get("prepend_scheme") == "never" or part.get("add_prefix_space") is False
            first.append(_replace(mark, " " if keep else ""))
        elif kind == "WordPiece":
            words = word_piece(str(part.get("prefix", "##")), tidy=bool(part.get("cleanup", True)))
            steps += words.steps
            first += words.first or ()
        elif kind == "BPEDecoder":
            step = _replace(str(part.get("suffix", "</w>")), " ")
        elif kind == "Strip" and fused and part.get("stop", 0) == 0:
            strip = (str(part["content"]), int(part["start"]))
        else:
            raise UnsupportedModelError(
                f"tokenizer.json: the decoder step {kind!r} cannot be done token by token; kbit decodes "
                "with ByteLevel, ByteFallback, Replace, Metaspace, WordPiece, BPEDecoder, Fuse and a Strip at the start"
            )
        if step is not None:
            steps.append(step)
            first.append(step)
    return Pieces(byte_level, byte_fallback, tuple(steps), tuple(first), strip)


def _replace(old: str, new: str) -> Step:
    return lambda token: token.replace(old, new)


def word_piece(prefix: str, *, tidy: bool) -> Pieces:
    """BERT's words: a token is a word of its own unless it begins with `prefix`."""
    clean = _tidy if tidy else str
    return Pieces(
        steps=(
            lambda token: clean(token[len(prefix) :] if token.startswith(prefix) else " " + token),
        ),
        first=(clean,),
    )


def _tidy(token: str) -> str:
    """WordPiece's clean-up: no space before punctuation and contractions."""
    for old, new in (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
        (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
    ):  # fmt: skip
        token = token.replace(old, new)
    return token

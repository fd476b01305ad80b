"""What every tokenizer file comes down to, and how control tokens are found in text."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field

import tokenizers

from kbit._core import KbitError, ModelFormatError
from kbit.text.pieces import Pieces

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in SentencePiece models and GGUF files."""
MAX_TOKENS = 4_000_000
MAX_TOKEN_BYTES = 64 << 10


@dataclass(frozen=True)
class ControlToken:
    """A control token as it stands in a text; `lstrip` and `rstrip` take the white space beside it."""

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False


class ControlTokens:
    """Finds control tokens in text, the longest first."""

    def __init__(self, tokens: Iterable[ControlToken]) -> None:
        self._by_text = {token.text: token for token in tokens if token.text}
        longest_first = sorted(self._by_text, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text: str) -> Iterator[str | ControlToken]:
        """Stretches of text and the control tokens between them."""
        at, strip = 0, False
        for found in self.pattern.finditer(text):
            token = self._by_text[found[0]]
            part = text[at : found.start()]
            part = part.lstrip() if strip else part
            part = part.rstrip() if token.lstrip else part
            if part:
                yield part
            yield token
            at, strip = found.end(), token.rstrip
        rest = text[at:].lstrip() if strip else text[at:]
        if rest:
            yield rest


@dataclass
class Vocabulary:
    """A tokenizer and what its files say about its use; ids that are absent are None.

    Attributes:
        core: Text to ids.
        pieces: Ids to bytes.
        names: Texts of named special tokens: ``bos_token``, ``eos_token``...
        control: Control tokens: nothing in decoded text, and no part of a text unless asked for.
        encode: Ids of a stretch of text, where `core` alone does not give them.
        tokens: How the file writes its tokens, where `core` has other names for some.
        inner: As `core`, for text that does not begin the whole; None where that makes no difference.
        prefix: Ids put before a text unless the caller says otherwise.
        suffix: Ids put after it.
    """

    core: tokenizers.Tokenizer
    pieces: Pieces
    names: dict[str, str] = field(default_factory=dict[str, str])
    control: list[ControlToken] = field(default_factory=list[ControlToken])
    encode: Callable[[str], list[int]] | None = None
    tokens: list[str] = field(default_factory=list[str])
    inner: tokenizers.Tokenizer | None = None
    bos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    eos_ids: list[int] = field(default_factory=list[int])
    prefix: list[int] = field(default_factory=list[int])
    suffix: list[int] = field(default_factory=list[int])

    def id_of(self, token: str) -> int | None:
        """Id of a token as the files write it; None if it is none."""
        return self.tokens.index(token) if token in self.tokens else self.core.token_to_id(token)


@contextlib.contextmanager
def typed_failures(what: str) -> Generator[None, None, None]:
    """What `tokenizers` raises inside, a panic of its Rust code too, becomes a ModelFormatError."""
    try:
        yield
    except KbitError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFormatError(f"{what}: {error}") from None


def check_tokens(tokens: list[str], where: str) -> None:
    """Bounds on a vocabulary.

    Raises:
        ModelFormatError: No token, too many, one too long, or two alike.
    """
    if not tokens:
        raise ModelFormatError(f"{where}: no tokens")
    if len(tokens) > MAX_TOKENS:
        raise ModelFormatError(f"{where}: {len(tokens)} tokens; at most {MAX_TOKENS} are read")
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_BYTES:
        raise ModelFormatError(
            f"{where}: a token of {longest} characters; at most {MAX_TOKEN_BYTES} are read"
        )
    if len(set(tokens)) != len(tokens):
        seen: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if token in seen:
                raise ModelFormatError(f"{where}: ids {seen[token]} and {i} are both {token!r}")
            seen[token] = i

"""SentencePiece models: the file `tokenizer.model`, and the same rules where a GGUF file carries them."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import tokenizers
from tokenizers import AddedToken, models

from kbit._core import ModelFormatError, UnsupportedModelError
from kbit.text.charsmap import Charsmap
from kbit.text.merges import merges_from_scores
from kbit.text.pieces import SPACE, Pieces, byte_of, spaces
from kbit.text.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ControlToken,
    Vocabulary,
    check_tokens,
    typed_failures,
)  # fmt: skip

UNIGRAM, BPE = 1, 2
_KINDS = {3: "WORD", 4: "CHAR"}
MAX_BYTES = 64 << 20


@dataclass
class Model:
    """What a SentencePiece model says.

    Attributes:
        kind: UNIGRAM or BPE.
        tokens: Pieces by id.
        scores: Of each piece.
        types: Of each piece.
        charsmap: Compiled normalisation rules; empty for none.
        dummy_prefix: A space is put before the text.
        remove_extra_spaces: Runs of spaces become one, and none are left at the ends.
        suffix_space: The space is put after the text instead.
        byte_fallback: What no piece covers becomes bytes.
        unk_id: Piece for what cannot be written; -1 for none, as with the next three.
    """

    kind: int = UNIGRAM
    tokens: list[str] = field(default_factory=list[str])
    scores: list[float] = field(default_factory=list[float])
    types: list[int] = field(default_factory=list[int])
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True
    escape_spaces: bool = True
    suffix_space: bool = False
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1


def parse(data: bytes) -> Model:
    """The model in the bytes of a `tokenizer.model`.

    Raises:
        ModelFormatError: Not a SentencePiece model, or cut off.
    """
    if len(data) > MAX_BYTES:
        raise ModelFormatError(f"tokenizer.model: {len(data)} bytes; at most {MAX_BYTES} are read")
    model = Model()
    for number, value in _fields(data):
        if number == 1:
            _piece(model, _message(value, "piece"))
        elif number == 2:
            for key, each in _fields(_message(value, "trainer_spec")):
                _trainer(model, key, each)
        elif number == 3:
            for key, each in _fields(_message(value, "normalizer_spec")):
                _normalizer(model, key, each)
    # An empty file is a valid message of no fields, but no tokenizer.
    check_tokens(model.tokens, "tokenizer.model")
    return model


def _piece(model: Model, data: bytes) -> None:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            try:
                text = _message(value, "piece").decode()
            except UnicodeDecodeError:
                raise ModelFormatError(
                    f"tokenizer.model: piece {len(model.tokens)} is not UTF-8"
                ) from None
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = _integer(value, "type")
    if score != score:
        raise ModelFormatError(
            f"tokenizer.model: the score of piece {len(model.tokens)} is not a number"
        )
    if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
        raise ModelFormatError(
            f"tokenizer.model: piece {len(model.tokens)} has the type {kind}; types are 1 to 6"
        )
    if not text:
        raise ModelFormatError(f"tokenizer.model: piece {len(model.tokens)} is empty")
    model.tokens.append(text)
    model.scores.append(score)
    model.types.append(kind)


def _trainer(model: Model, number: int, value: int | bytes) -> None:
    ids = {40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
    if number == 3:
        model.kind = _integer(value, "model_type")
    elif number == 24:
        model.suffix_space = bool(_integer(value, "treat_whitespace_as_suffix"))
    elif number == 35:
        model.byte_fallback = bool(_integer(value, "byte_fallback"))
    elif number in ids:
        setattr(model, ids[number], _integer(value, ids[number]))


def _normalizer(model: Model, number: int, value: int | bytes) -> None:
    flags = {3: "dummy_prefix", 4: "remove_extra_spaces", 5: "escape_spaces"}
    if number == 2:
        model.charsmap = _message(value, "precompiled_charsmap")
    elif number in flags:
        setattr(model, flags[number], bool(_integer(value, flags[number])))


# Protocol buffers: numbered fields, each a variable-length integer, 4 or 8 bytes, or a length and that many bytes.


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ModelFormatError(
                f"tokenizer.model: wire type {wire} at byte {at}; it is no SentencePiece model"
            )
        if size > len(data) - at:
            raise ModelFormatError(
                f"tokenizer.model: a field of {size} bytes where {len(data) - at} are left"
            )
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ModelFormatError(f"tokenizer.model: a number that does not end at byte {at}")


def _message(value: int | bytes, what: str) -> bytes:
    if isinstance(value, int):
        raise ModelFormatError(f"tokenizer.model: {what} is a number")
    return value


def _integer(value: int | bytes, what: str) -> int:
    if isinstance(value, bytes):
        raise ModelFormatError(f"tokenizer.model: {what} is no number")
    return value - (1 << 64) if value >> 63 else value


# From the model to a tokenizer


class Normalizer:
    """Text as SentencePiece matches its pieces against it: rules applied, spaces as U+2581."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._rules = Charsmap(model.charsmap) if model.charsmap else None
        own = sorted(
            (t for t, k in zip(model.tokens, model.types, strict=True) if k == USER_DEFINED),
            key=len,
            reverse=True,
        )
        self._own = re.compile("|".join(map(re.escape, own))) if own else None
        self._own_starts = {token[0] for token in own}

    def __call__(self, text: str) -> str:
        """The normalised text; empty if nothing is left of it."""
        model = self._model
        if model.remove_extra_spaces:
            steps = self._after_spaces(self._steps(text))
            if steps is None:
                return ""
            text = "".join(_single_spaces(steps)).replace(" ", SPACE)
            # The library strips the end after it put the space before and before it puts the one after.
            text = (SPACE + text if model.dummy_prefix and not model.suffix_space else text).rstrip(
                SPACE
            )
        elif text:
            text = "".join(self._steps(text)).replace(" ", SPACE)
            text = SPACE + text if model.dummy_prefix and not model.suffix_space else text
        else:
            return ""
        return text + SPACE if model.dummy_prefix and model.suffix_space else text

    @staticmethod
    def _after_spaces(steps: Iterator[str]) -> Iterator[str] | None:
        """The steps from the first that is no space; None if all are."""
        for step in steps:
            if step != " ":
                return itertools.chain([step], steps)
        return None

    def _steps(self, text: str) -> Iterator[str]:
        """What the rules make of the text, match by match; user-defined pieces stay as they are."""
        if self._rules is None and self._own is None:
            yield from _RUNS.findall(text)
            return
        at = 0
        while at < len(text):
            if (
                text[at] in self._own_starts
                and self._own is not None
                and (own := self._own.match(text, at))
            ):
                yield own[0]
                at = own.end()
                continue
            found = self._rules.match(text, at) if self._rules is not None else None
            if found is None:
                yield text[at]
                at += 1
            else:
                yield found[1]
                at = found[0]


def _single_spaces(steps: Iterator[str]) -> Iterator[str]:
    """The steps without the spaces that follow one (or the start)."""
    after_space = True
    for step in steps:
        kept = step.lstrip(" ") if after_space else step
        if kept:
            yield kept
            after_space = kept.endswith(" ")


_RUNS = re.compile(r" |[^ ]+")
"""Steps of a text without rules: spaces one by one, and what stands between them."""


def build(model: Model) -> Vocabulary:
    """A tokenizer of a model: the ids of the SentencePiece library.

    Control tokens are never parsed out of text; user-defined pieces always are.

    Raises:
        UnsupportedModelError: A model of words or characters, or one that does not escape spaces.
        ModelFormatError: Ids outside the vocabulary, or rules that are cut off.
    """
    if model.kind not in (UNIGRAM, BPE):
        raise UnsupportedModelError(
            f"tokenizer.model: of type {_KINDS.get(model.kind, model.kind)}; kbit reads UNIGRAM and BPE"
        )
    if not model.escape_spaces:
        raise UnsupportedModelError(
            "tokenizer.model: spaces are not escaped; kbit reads models with escape_whitespaces"
        )
    if model.byte_fallback and {byte_of(t) for t, k in _typed(model) if k == BYTE} != set(
        range(256)
    ):
        raise ModelFormatError(
            "tokenizer.model: byte_fallback without a piece for each of the 256 bytes"
        )
    with typed_failures("tokenizer.model"):
        core = _unigram(model) if model.kind == UNIGRAM else _bpe(model)
    core.encode_special_tokens = True  # control tokens are cut out of the text before it comes here
    vocabulary = Vocabulary(
        core, Pieces(byte_fallback=True, steps=(spaces,), strip=(" ", int(model.dummy_prefix)))
    )
    vocabulary.control = [
        ControlToken(i, t) for i, (t, k) in enumerate(_typed(model)) if k in (CONTROL, UNKNOWN)
    ]
    vocabulary.encode = _Encoder(model, core)
    vocabulary.tokens = model.tokens
    for name in ("unk", "bos", "pad"):
        setattr(vocabulary, f"{name}_id", _checked(model, getattr(model, f"{name}_id")))
    eos = _checked(model, model.eos_id)
    vocabulary.eos_ids = [] if eos is None else [eos]
    named = {
        "unk": vocabulary.unk_id,
        "bos": vocabulary.bos_id,
        "eos": eos,
        "pad": vocabulary.pad_id,
    }
    vocabulary.names = {
        f"{name}_token": model.tokens[i] for name, i in named.items() if i is not None
    }
    return vocabulary


def _typed(model: Model) -> Iterator[tuple[str, int]]:
    return zip(model.tokens, model.types, strict=True)


def _checked(model: Model, token_id: int) -> int | None:
    """An id of a special piece; the defaults of models that have no such piece point anywhere."""
    if 0 <= token_id < len(model.tokens) and model.types[token_id] in (
        CONTROL,
        UNKNOWN,
        USER_DEFINED,
    ):
        return token_id
    return None


def _bpe(model: Model) -> tokenizers.Tokenizer:
    scores = {
        t: s
        for t, s, k in zip(model.tokens, model.scores, model.types, strict=True)
        if k in (NORMAL, UNUSED)
    }
    vocab = {token: i for i, token in enumerate(model.tokens)}
    unk = _checked(model, model.unk_id)
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab, merges_from_scores(scores), byte_fallback=model.byte_fallback, fuse_unk=True,
            unk_token=None if unk is None else model.tokens[unk],
        )
    )  # fmt: skip
    own = [AddedToken(t, normalized=False) for t, k in _typed(model) if k == USER_DEFINED]
    core.add_tokens(own)  # pyright: ignore[reportUnknownMemberType]
    return core


def _unigram(model: Model) -> tokenizers.Tokenizer:
    """Pieces that text must not match get a name with a space in it, which normalised text never holds."""
    best = max([0.1, *(s for s, k in zip(model.scores, model.types, strict=True) if k == NORMAL)])
    vocab: list[tuple[str, float]] = []
    for i, (token, score, kind) in enumerate(
        zip(model.tokens, model.scores, model.types, strict=True)
    ):
        if kind == NORMAL:
            vocab.append((token, score))
        elif kind == USER_DEFINED:  # as the library scores them, seen on 125,000 texts
            vocab.append((token, len(token.encode()) * best - 0.1))
        else:
            vocab.append((f" {i}", 0.0))
    return tokenizers.Tokenizer(
        models.Unigram(vocab, _checked(model, model.unk_id), byte_fallback=False)
    )


class _Encoder:
    """Ids of a stretch of text."""

    def __init__(self, model: Model, core: tokenizers.Tokenizer) -> None:
        self._normalize = Normalizer(model)
        self._core = core
        fallback = model.byte_fallback and model.kind == UNIGRAM
        self._unk = _checked(model, model.unk_id) if fallback else None
        self._bytes = {byte_of(t): i for i, (t, k) in enumerate(_typed(model)) if k == BYTE}

    def __call__(self, text: str) -> list[int]:
        normalized = self._normalize(text)
        encoding = self._core.encode(normalized, add_special_tokens=False)
        if self._unk is None or self._unk not in encoding.ids:
            return encoding.ids
        ids: list[int] = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == self._unk:
                ids += [self._bytes[byte] for byte in normalized[start:end].encode()]
            else:
                ids.append(token_id)
        return ids

"""tokenizer.json and the small JSON files beside it: read, checked, handed to `tokenizers`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, cast

import tokenizers

from kbit._core import ModelFormatError
from kbit.text import gguf_vocab, patterns
from kbit.text.charsmap import Charsmap
from kbit.text.kinds import is_dict, is_list
from kbit.text.vocabulary import MAX_TOKEN_BYTES, MAX_TOKENS, typed_failures

MAX_BYTES = 256 << 20
"""Largest tokenizer.json read."""
MAX_UNIGRAM = 1024
"""Longest token of a Unigram model: each place in a text is tried with every length up to it."""
MAX_WORD = 256
"""Longest word that WordPiece takes apart, in characters: its time grows with the cube."""
MAX_GROWTH = 64
"""How many times as long a normalizer may make a text; NFKC's worst is 18."""
MAX_PART = 1 << 18
MAX_RULES = 4 << 20
"""Size of the parts of a tokenizer.json that are not its vocabulary."""


def read_bytes(path: Path) -> bytes | None:
    """The bytes of a file; None where there is no such file.

    Raises:
        ModelFormatError: Larger than 256 MiB.
        OSError: It cannot be read.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    if size > MAX_BYTES:
        raise ModelFormatError(f"{path.name}: {size} bytes; at most {MAX_BYTES} are read")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file.

    Raises:
        ModelFormatError: Not a JSON object, a key twice, nested too deeply, or larger than 256 MiB.
        OSError: It cannot be read.
    """
    data = read_bytes(path)
    return None if data is None else parse_json(data, path.name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """As `read_json`, from bytes; `name` is for the sentence of an error."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ModelFormatError(f"{name}: nested too deeply") from None
    except ModelFormatError as error:
        raise ModelFormatError(f"{name}: {error}") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise ModelFormatError(f"{name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{name}: holds a {type(value).__name__}, not an object")
    return cast("dict[str, Any]", value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A reader that takes the first of two equal keys and one that takes the last would load two different models."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ModelFormatError(f"the key {key!r} stands twice in one object")
            seen.add(key)
    return value


def check(spec: dict[str, Any]) -> None:
    """Refuse what `tokenizers` would not bound: patterns, growth of the text, huge tokens.

    Raises:
        ModelFormatError: With what it is that goes too far.
    """
    model = spec.get("model")
    if not isinstance(model, dict):
        raise ModelFormatError("tokenizer.json: no model")
    _check_model(cast("dict[str, Any]", model))
    added = spec.get("added_tokens")
    for token in cast("list[Any]", added) if isinstance(added, list) else []:
        match token:
            case {"id": int(token_id), "content": str(text)} if 0 <= token_id < MAX_TOKENS and text:
                pass
            case _:
                raise ModelFormatError(
                    f"tokenizer.json: an added token is {token!r:.80}, without a good id and content"
                )
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        size = len(json.dumps(spec.get(part)))
        if size > (MAX_RULES if part == "normalizer" else MAX_PART):
            raise ModelFormatError(f"tokenizer.json: the {part} takes {size} characters")
        _check_patterns(spec.get(part))
    growth = _growth(spec.get("normalizer"))
    if growth > MAX_GROWTH:
        raise ModelFormatError(
            f"tokenizer.json: the normalizer may make a text {growth} times as long; {MAX_GROWTH} is the bound"
        )


def _check_model(model: dict[str, Any]) -> None:
    vocab: Any = model.get("vocab")
    tokens: list[str]
    if is_dict(vocab):
        tokens = list(vocab)
        if not all(type(i) is int and 0 <= i < MAX_TOKENS for i in vocab.values()):
            raise ModelFormatError(f"tokenizer.json: a token has no id in 0..{MAX_TOKENS - 1}")
        longest = MAX_TOKEN_BYTES
    elif is_list(vocab):  # Unigram: every prefix of every place is looked up
        tokens = [each[0] for each in vocab if is_list(each) and each and isinstance(each[0], str)]
        if len(tokens) != len(vocab):
            raise ModelFormatError(
                "tokenizer.json: the vocabulary of a Unigram model holds tokens with scores, and not only those"
            )
        longest = MAX_UNIGRAM
    else:
        raise ModelFormatError("tokenizer.json: the model has no vocabulary")
    size = max(map(len, tokens), default=0)
    if len(tokens) > MAX_TOKENS or size > longest:
        raise ModelFormatError(
            f"tokenizer.json: {len(tokens)} tokens of up to {size} characters; "
            f"at most {MAX_TOKENS} of {longest} are read"
        )
    word = model.get("max_input_chars_per_word", 100)
    if not isinstance(word, int) or word > MAX_WORD:
        raise ModelFormatError(
            f"tokenizer.json: max_input_chars_per_word is {word}; at most {MAX_WORD} is bounded in time"
        )


def _check_patterns(part: Any) -> None:
    if isinstance(part, dict):
        for key, value in cast("dict[str, Any]", part).items():
            if key == "Regex" and isinstance(value, str):
                if value not in gguf_vocab.PATTERNS:
                    patterns.check(value, "tokenizer.json")
            else:
                _check_patterns(value)
    elif isinstance(part, list):
        for value in cast("list[Any]", part):
            _check_patterns(value)


def _growth(normalizer: Any) -> int:
    """How many times as long a normalizer can make a text."""
    match normalizer:
        case {"type": "Sequence", "normalizers": parts} if is_list(parts):
            growth = 1
            for part in parts:
                growth *= _growth(part)
                if growth > MAX_GROWTH:
                    break
            return growth
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return max(1, -(-len(new) // max(1, len(old)))) if old else MAX_GROWTH + 1
        case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": str(new)}:  # T5's
            return max(1, -(-len(new) // 2))
        case {"type": "Replace", "content": str(new)}:
            return len(new) + 1
        case {"type": "Prepend", "prepend": str(new)}:
            return 1 + len(new)
        case {"type": "Precompiled", "precompiled_charsmap": str(rules)}:
            return _longest_rule(rules)
        case _:
            return 1


def _longest_rule(rules: str) -> int:
    try:
        blob = base64.b64decode(rules, validate=True)
    except ValueError:
        raise ModelFormatError("tokenizer.json: the precompiled_charsmap is not base64") from None
    return 1 if not blob else Charsmap(blob).longest()


def build(data: bytes) -> tokenizers.Tokenizer:
    """A tokenizer from the bytes of a tokenizer.json.

    Raises:
        ModelFormatError: `tokenizers` refuses it.
    """
    with typed_failures("tokenizer.json"):
        core = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    # A padded or truncated encoding would change the prompt: lengths are the caller's business.
    core.no_padding()
    core.no_truncation()
    return core

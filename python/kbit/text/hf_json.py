"""tokenizer.json and the small JSON files beside it: read, checked, handed to `tokenizers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import tokenizers

from kbit._core import ModelFormatError

MAX_BYTES = 256 << 20
"""Largest tokenizer.json read."""


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
    """Refuse what `tokenizers` would not bound.

    Raises:
        ModelFormatError: Tokens of the wrong form.
    """
    added = spec.get("added_tokens")
    for token in cast("list[Any]", added) if isinstance(added, list) else []:
        match token:
            case {"id": int(), "content": str()}:
                pass
            case _:
                raise ModelFormatError(f"tokenizer.json: an added token is {token!r:.80}, without an id and content")


def build(data: bytes) -> tokenizers.Tokenizer:
    """A tokenizer from the bytes of a tokenizer.json.

    Raises:
        ModelFormatError: `tokenizers` refuses it.
    """
    try:
        core = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:
        raise ModelFormatError(f"tokenizer.json: {error}") from None
    # A padded or truncated encoding would change the prompt: lengths are the caller's business.
    core.no_padding()
    core.no_truncation()
    return core

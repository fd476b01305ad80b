"""Tokenizers against given ids, and the properties every one of them has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kbit.text import StreamDecoder, Tokenizer

SHARED = Path(os.environ.get("KBIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
STORIES = SHARED / "models" / "kbit-stories"


def need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name}: not beside this checkout")
    return path


@pytest.fixture(scope="module")
def stories() -> Tokenizer:
    return Tokenizer.from_dir(need(STORIES))


def test_special_text_is_text_unless_asked(stories: Tokenizer) -> None:
    assert 0 not in stories.encode("a<|endoftext|>b")
    assert list(stories.encode("<|endoftext|>", special=True)) == [0]


def test_pieces_join_to_the_whole(stories: Tokenizer) -> None:
    text = "Füße 🦙🏽 and 中文\n"
    ids = stories.encode(text)
    stream = StreamDecoder(stories)
    pieces = [stream.push(int(i)) for i in ids] + [stream.finish()]
    assert "".join(pieces) == text == stories.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)

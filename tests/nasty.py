"""Strings that break tokenizers: seeded, so that a failure can be had again."""

from __future__ import annotations

import random
from collections.abc import Iterator

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "Once",
    "upon",
    "time",
    "there",
    "was",
    "little",
    "girl",
    "named",
    "Lily",
    "don't",
    "WE'LL",
    "I'm",
    "it's",
    "naïve",
    "café",
    "Straße",
    "日本語",
    "中文",
    "テスト",
    "한국어",
    "русский",
    "текст",
    "עברית",
    "العربية",
    "हिन्दी",
    "ไทย",
    "ﬁne",
    "①",
    "㍿",
    "Ω",
    "ＦＵＬＬ",
    "é",
    "ñ",
    "12345",
    "3.14",
    "1,000,000",
    "0x1F",
    "foo_bar",
    "http://a.b/c?d=e&f#g",
    "<b>",
    "</s>",
    "<s>",
    "<unk>",
    "<|im_start|>",
    "<|endoftext|>",
    "[INST]",
    "<0x0A>",
    "▁",
    "▁the",
    "⁇",
    "Ġ",
    "Ċ",
    "<u>",
    "<sep>",
    "{{x}}",
    "🦙",
    "👩\u200d👩\u200d👧",
    "🏳️\u200d🌈",
    "Ǆ",
    "ß",
    "ŉ",
]
SPACES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\u200b",
    "   ",
    "\x0b",
    "\x85",
    " \n ",
    "\u2028",
]
ODD = [
    "\x00", "\x01", "\x1f", "\x7f", "\ufeff", "\ufffd", "\u0301", "\u0e33", "\u064b", "\u200d", "\ufe0f",
    "\u20e3", "\U0010ffff",
    "\ue000", "\u0130", "\u1e9e", "\u2126", "\u212b", "\ufdfa", "\uff9e", "\u1100\u1161", "\U0001f1e6\U0001f1fa",
    "\u00ad", "\ufb03",
]  # fmt: skip


def nasty(count: int, seed: int = 0) -> Iterator[str]:
    """`count` strings: words, runs of white space, odd and random characters, repetitions, now and then a long one."""
    rng = random.Random(seed)
    for i in range(count):
        parts: list[str] = []
        for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 13]) if i % 1000 else 400):
            kind = rng.random()
            if kind < 0.45:
                parts.append(rng.choice(WORDS))
            elif kind < 0.65:
                parts.append(rng.choice(SPACES))
            elif kind < 0.75:
                parts.append(rng.choice(ODD))
            elif kind < 0.82:
                parts.append(
                    "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(1, 8)))
                )
            elif kind < 0.88:
                code = rng.randrange(0x110000)
                parts.append(chr(code) if not 0xD800 <= code < 0xE000 else "x")
            elif kind < 0.94:
                parts.append(rng.choice(WORDS + SPACES + ODD) * rng.randrange(2, 20))
            else:
                word = rng.choice(WORDS)
                parts.append(word[: rng.randrange(len(word) + 1)].swapcase())
            if rng.random() < 0.4:
                parts.append(" ")
        yield "".join(parts)

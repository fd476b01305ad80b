"""Tokenizer files that are damaged or mean harm: a typed error, in bounded time and memory."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kbit import KbitError, ModelFormatError, UnsupportedModelError
from kbit.text import Tokenizer, patterns, sentencepiece
from kbit.text.charsmap import Charsmap
from kbit.text.gguf_vocab import PRE_TOKENIZERS

TEXT = "ab ab1 <s>x ﬁne\u3000 日本 <0x41>"


def bpe(**changes):
    """A small tokenizer.json."""
    spec = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 5,
                "content": "<s>",
                "special": True,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2, "\u0120": 3, "\u0120ab": 4},
            "merges": [["a", "b"], ["\u0120", "ab"]],
        },
    }
    return spec | changes


def field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def piece(text: str, score: float, kind: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


def spm(kind: int = 2, extra: bytes = b"", pieces: bytes = b"") -> bytes:
    """A small tokenizer.model."""
    data = piece("<unk>", 0.0, 2) + piece("<s>", 0.0, 3) + piece("</s>", 0.0, 3)
    for i, text in enumerate(["\u2581", "a", "b", "ab", "\u2581ab", "x", "1"]):
        data += piece(text, -1.0 - i)
    data += piece("<u>", 0.0, 4) + pieces
    return data + field(2, field(3, kind)) + field(3, field(1, b"identity")) + extra


def gguf(**changes):
    """The metadata of a small GGUF tokenizer; None takes a key away."""
    meta = {
        "model": "llama", "tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab", "<0x41>"],
        "scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, 0.0], "token_type": [2, 3, 3, 1, 1, 1, 1, 1, 6],
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True, "pre": "default",
        "merges": ["a b", "\u2581 ab"], "add_space_prefix": True, "precompiled_charsmap": [0, 0, 0, 0],
    } | changes  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items() if value is not None}


def from_spm(data: bytes) -> Tokenizer:
    return Tokenizer(sentencepiece.build(sentencepiece.parse(data)), {})


def use(tokenizer: Tokenizer) -> None:
    for special in (False, True):
        ids = tokenizer.encode(TEXT, special=special)
        tokenizer.decode(ids)
    tokenizer.encode("")


def write(directory: Path, data: bytes | dict, name: str = "tokenizer.json") -> Path:
    (directory / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return directory


def damaged(data: bytes, step: int = 1):
    """Every truncation and every flipped bit (every `step`-th)."""
    for end in range(len(data)):
        yield data[:end]
    for bit in range(0, 8 * len(data), step):
        flipped = bytearray(data)
        flipped[bit >> 3] ^= 1 << (bit & 7)
        yield bytes(flipped)


def survives(make, cases) -> dict[str, int]:
    """How often `make` succeeded and failed with a typed error; anything else is raised."""
    outcomes = [outcome(make, case) for case in cases]
    return {what: outcomes.count(what) for what in ("ok", "typed")}


def outcome(make, case) -> str:
    try:
        use(make(case))
    except KbitError:
        return "typed"
    return "ok"


def test_the_small_files_are_good(tmp_path):
    for tokenizer in (
        Tokenizer.from_dir(write(tmp_path, bpe())),
        from_spm(spm()),
        from_spm(spm(1)),
        Tokenizer.from_gguf(gguf()),
        Tokenizer.from_gguf(gguf(model="t5")),
    ):
        use(tokenizer)
        assert tokenizer.decode(tokenizer.encode("ab ab")).strip().replace("b", "") in (
            "a a",
            " ",
        ), tokenizer


def test_damaged_tokenizer_json(tmp_path):
    data = json.dumps(bpe(), ensure_ascii=False).encode()
    count = survives(lambda case: Tokenizer.from_dir(write(tmp_path, case)), damaged(data, 3))
    assert count["typed"] > 2 * len(data)


def test_damaged_config(tmp_path):
    config = {
        "bos_token": {"content": "<s>"},
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
        "eos_token": "b",
    }
    write(tmp_path, bpe())
    data = json.dumps(config).encode()
    count = survives(
        lambda case: Tokenizer.from_dir(write(tmp_path, case, "tokenizer_config.json")),
        damaged(data),
    )
    assert count["ok"] > 0 < count["typed"]


@pytest.mark.parametrize("kind", [1, 2])
def test_damaged_sentencepiece(kind):
    data = spm(kind)
    count = survives(from_spm, damaged(data))
    assert count["typed"] > len(data)


WRONG = [
    None,
    -1,
    0,
    2**31,
    2**63 - 1,
    float("nan"),
    "x",
    "",
    [],
    [None],
    ["a"] * 9,
    [0] * 9,
    [[]] * 9,
    {},
    True,
    b"\xff",
]


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "gemma4"])
def test_wrong_values_in_gguf(model):
    """Each key set to each wrong value: a typed error, or a reading that works."""
    keys = [key.removeprefix("tokenizer.ggml.") for key in gguf()]
    cases = [{key: value} for key in keys for value in WRONG]
    count = survives(lambda case: Tokenizer.from_gguf(gguf(**({"model": model} | case))), cases)
    assert count["typed"] >= len(WRONG)


def test_wrong_values_in_tokenizer_json(tmp_path):
    """Each part replaced by each wrong value, two levels deep."""
    cases = [bpe(**{key: value}) for key in bpe() for value in WRONG[:-1] if value == value]
    for key, part in bpe().items():
        if isinstance(part, dict):
            cases += [
                bpe(**{key: part | {name: value}})
                for name in part
                for value in WRONG[:-1]
                if value == value
            ]
    count = survives(lambda case: Tokenizer.from_dir(write(tmp_path, case)), cases)
    assert count["ok"] + count["typed"] == len(cases)
    assert count["typed"] >= len(bpe())


def model(**changes):
    return bpe(model=bpe()["model"] | changes)


def split(pattern):
    return bpe(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
    )


def replaced(*pairs):
    steps = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]
    return bpe(normalizer={"type": "Sequence", "normalizers": steps})


HARMFUL = {
    "catastrophic pattern": split(r"(a+)+$"),
    "ambiguous alternatives": split(r"(a|a)*b"),
    "cubic pattern": split(r"a*a*b"),
    "optional parts": split("a?" * 40 + "a" * 40),
    "back reference": split(r"(a*)\1b"),
    "recursive pattern": split(r"(?<x>a\g<x>?b)"),
    "huge repetition": split("((a{100}){100}){100}"),
    "deep pattern": split("(" * 3000 + "a" + ")" * 3000),
    "long pattern": split("a" * 100_000),
    "pattern in a replacement": bpe(
        normalizer={"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""}
    ),
    "growth": replaced(("a", "a" * 1000)),
    "growth step by step": replaced(*[("a", "aa")] * 40),
    "growth of nothing": replaced(("", "a")),
    "long prefix": bpe(normalizer={"type": "Prepend", "prepend": "a" * 100_000}),
    "huge part": bpe(post_processor={"type": "Sequence", "processors": [{"x": "a" * 300_000}]}),
    "huge id": model(vocab={"a": 4_000_000_000}, merges=[]),
    "negative id": model(vocab={"a": -1}, merges=[]),
    "fractional id": model(vocab={"a": 0.5}, merges=[]),
    "merge of no token": model(merges=[["x", "y"]]),
    "merge of three": model(merges=[["a", "b", "c"]]),
    "long token": model(vocab={"a" * 70_000: 0}, merges=[]),
    "long word": model(
        type="WordPiece",
        vocab={"a": 0, "[UNK]": 1},
        unk_token="[UNK]",
        max_input_chars_per_word=10**9,
        continuing_subword_prefix="##",
    ),
    "unknown model": model(type="Magic"),
    "no model": bpe(model=None),
    "long unigram token": bpe(
        model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a" * 2000, -1.0]]}
    ),
    "unigram id": bpe(model={"type": "Unigram", "unk_id": 9, "vocab": [["<unk>", 0.0]]}),
    "unigram score": bpe(model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", "x"]]}),
    "added token without id": bpe(added_tokens=[{"content": "x"}]),
    "added token far away": bpe(added_tokens=[{"id": 10**12, "content": "x", "special": True}]),
    "charsmap": bpe(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "charsmap not base64": bpe(normalizer={"type": "Precompiled", "precompiled_charsmap": "*"}),
    "decoder of all tokens": bpe(
        decoder={"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    ),
    "deep JSON": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "key twice": b'{"model": 1, "model": 2}',
    "not an object": b"[1]",
    "not UTF-8": b'{"\xff": 1}',
    "empty": b"",
    "null": b"null",
    "NaN": b'{"model": NaN}',
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_tokenizer_json(tmp_path, name):
    start = time.perf_counter()
    with pytest.raises((ModelFormatError, UnsupportedModelError)):
        use(Tokenizer.from_dir(write(tmp_path, HARMFUL[name])))
    assert time.perf_counter() - start < 1.5


HARMFUL_SPM = {
    "empty": b"",
    "no pieces": field(2, field(3, 2)),
    "long length": b"\x0a\xff\xff\xff\xff\x7f",
    "endless number": b"\x0a" + b"\xff" * 20,
    "group": b"\x0b",
    "not UTF-8": field(1, field(1, b"\xff")),
    "empty piece": field(1, field(1, b"")),
    "piece is a number": field(1, 7),
    "type 99": field(1, field(1, b"a") + field(3, 99)),
    "score NaN": field(1, field(1, b"a") + field(2, float("nan"))),
    "twice the same": spm(pieces=piece("a", -1.0)),
    "words": spm(3),
    "byte fallback without bytes": spm(extra=field(2, field(35, 1))),
    "rules cut off": spm(extra=field(3, field(2, b"\xff\xff\xff\x7f1234"))),
    "spaces not escaped": spm(extra=field(3, field(5, 0))),
    "long token": spm(pieces=piece("a" * 70_000, -1.0)),
    "many long tokens": spm(pieces=b"".join(piece("a" * 20_000 + str(i), -1.0) for i in range(20))),
    "a pickle": b"\x80\x04\x95",
    "an image": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", HARMFUL_SPM)
def test_harmful_sentencepiece(name):
    start = time.perf_counter()
    with pytest.raises((ModelFormatError, UnsupportedModelError)):
        use(from_spm(HARMFUL_SPM[name]))
    assert time.perf_counter() - start < 1.5


def test_rules_that_point_anywhere():
    """Tries of random units: what they match is their own business, but they end and stay inside."""
    rng = random.Random(3)
    done = 0
    for _ in range(300):
        units = struct.pack(
            "<64I",
            *(
                rng.getrandbits(32)
                if rng.random() < 0.5
                else rng.randrange(256) << 10 | rng.randrange(512)
                for _ in range(64)
            ),
        )
        blob = struct.pack("<I", len(units)) + units + b"ab\0c\0"
        data = spm(1, extra=field(3, field(2, blob)))
        done += sum(survives(from_spm, [data]).values())
    assert done == 300


def test_rules_that_point_just_outside():
    """A trie of one unit whose offset leads to the first place after it."""
    for offset in (1, ord("a") ^ 1, 255):
        blob = struct.pack("<II", 4, offset << 10) + b"x\0"
        assert Charsmap(blob).match("a", 0) is None


GOOD_PATTERNS = sorted({p for pre in PRE_TOKENIZERS.values() for p in pre.patterns})


def test_published_patterns_pass():
    """All but two of the published pre-tokenizers pass by the rule itself; those two are known by their text."""

    def is_refused(pattern):
        try:
            patterns.check(pattern, "x")
        except ModelFormatError:
            return True
        return False

    refused = [pattern for pattern in GOOD_PATTERNS if is_refused(pattern)]
    assert len(refused) == 2
    assert all("IMGIMG" in each or r"(?: \p{L}\p{M}*)*" in each for each in refused)


CHILD = """
import json, resource, sys, time
from pathlib import Path
from kbit.text import Tokenizer
from kbit import KbitError
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
directory, texts = json.load(sys.stdin)
tokenizer = Tokenizer.from_dir(directory)
start = time.perf_counter()
for text in texts:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("a", "b"), text[:20]
print(time.perf_counter() - start)
"""


def test_huge_texts(tmp_path):
    """A megabyte of one character: time and memory stay in proportion."""
    write(tmp_path, bpe(model=bpe()["model"] | {"vocab": _bytes(), "merges": [["b", "b"]]}))
    texts = [char * (1 << 20) for char in ("b", " ", "1", "\n", "é")]
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([str(tmp_path), texts]),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert float(child.stdout) < 60


def _bytes():
    from kbit.text.pieces import byte_alphabet

    return {char: i for i, char in enumerate(byte_alphabet().values())} | {"bb": 256}

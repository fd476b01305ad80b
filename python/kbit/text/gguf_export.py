"""Tokenizers of Hugging Face directories as `tokenizer.*` keys of GGUF, where llama.cpp gives the same ids for them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from kbit._core import ModelFormatError, UnsupportedModelError
from kbit.text import directory, hf_json, sentencepiece
from kbit.text.gguf_vocab import PRE_TOKENIZERS
from kbit.text.merges import merges_from_scores
from kbit.text.pieces import SPACE, byte_of
from kbit.text.tokenizer import Tokenizer
from kbit.text.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)  # fmt: skip

PROBES = (
    "Once upon a time, there was a little girl named Lily.",
    "x",
    "don't stop; I'LL go",
    "a  b   c",
    "a\n\nb\tc\r\nd",
    "3.14159 + 1,000,000 = 0x1F",
    "def f(x):\n    return x[0] ** 2  # no",
    "naïve café Straße",
    "日本語 한국어 русский عربي हिन्दी",
    "ﬁne ＦＵＬＬ ① ㎏²",
    "🦙 👩\u200d👧",
    "<b>&amp;</b> {{x}} \\n | ~",
)
"""Texts that have the same ids before and after, or the tokenizer is not written."""
_WAY_OUT = (
    "kbit runs the model as it is, and `kbit convert SRC DIRECTORY` saves it with its tokenizer"
)


def metadata(root: Path, vocab_size: int) -> dict[str, Any]:
    """The keys for the tokenizer of a directory; `no_vocab` where it has none.

    Args:
        root: The directory.
        vocab_size: Rows of the embedding; ids without a token become unused ones.

    Raises:
        UnsupportedModelError: llama.cpp would give other ids; the sentence says why, and what to do instead.
        ModelFormatError: A file breaks its format, or a token is beyond the embedding.
    """
    spec = hf_json.read_json(root / "tokenizer.json")
    model = next((f for f in map(root.joinpath, directory.SENTENCEPIECE) if f.exists()), None)
    if spec is None and model is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    vocabulary, templates = directory.read(root)
    kind = _object(spec.get("model") if spec else None).get("type")
    if spec is not None and kind == "BPE" and (name := _pre_tokenizer(spec)):
        keys = _byte_level(spec, name, vocabulary, vocab_size)
    elif model is not None:
        parsed = sentencepiece.parse(model.read_bytes())
        keys = _sentencepiece(parsed, vocabulary, vocab_size)
    else:
        keys = _sentencepiece(_from_json(spec or {}), vocabulary, vocab_size)
    keys |= _special(vocabulary, templates)
    _check(keys, Tokenizer(vocabulary, templates))
    return keys


def _check(keys: Mapping[str, Any], meant: Tokenizer) -> None:
    written = Tokenizer.from_gguf(keys)
    for text in PROBES:
        before, after = (t.encode(text, add_bos=False).tolist() for t in (meant, written))
        if before != after:
            raise UnsupportedModelError(
                f"convert: in GGUF {text!r} would be the tokens {after}, in this tokenizer they are {before}: GGUF has "
                f"no words for its normalisation or its merges; {_WAY_OUT}"
            )


class _Table:
    """Tokens by id; those that nothing names are unused."""

    def __init__(self, size: int) -> None:
        self.tokens = [f"[PAD{i}]" for i in range(size)]
        self.scores = [-10000.0] * size
        self.types = [UNUSED] * size

    def put(self, token_id: int, text: str, score: float, kind: int) -> None:
        if not 0 <= token_id < len(self.tokens):
            raise ModelFormatError(
                f"tokenizer: {text!r} is token {token_id}, the model has {len(self.tokens)}"
            )
        self.tokens[token_id] = text
        self.scores[token_id] = score
        self.types[token_id] = kind

    def put_added(self, vocabulary: Vocabulary, space: str) -> None:
        """Tokens beside the model; `space` is written for U+2581 in those that are no control tokens."""
        for i, token in vocabulary.core.get_added_tokens_decoder().items():
            if i >= len(self.types) or self.types[i] != UNKNOWN:
                text = token.content if token.special else token.content.replace(SPACE, space)
                self.put(i, text, -1000.0, CONTROL if token.special else USER_DEFINED)

    def keys(self) -> dict[str, Any]:
        return {
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
        }


# Byte-level BPE


def _byte_level(
    spec: Mapping[str, Any], name: str, vocabulary: Vocabulary, vocab_size: int
) -> dict[str, Any]:
    model = _object(spec.get("model"))
    table = _Table(vocab_size)
    for text, i in model["vocab"].items():
        table.put(i, text, 0.0, NORMAL)
    table.put_added(vocabulary, SPACE)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    named = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
    return named | table.keys() | {"tokenizer.ggml.merges": merges}


def _pre_tokenizer(spec: Mapping[str, Any]) -> str | None:
    """The name llama.cpp has for how a byte-level tokenizer.json splits text; None if it is none, or has no name."""
    top = _object(spec.get("pre_tokenizer"))
    steps: list[Any] = top.get("pretokenizers", [top])
    patterns: list[str] = []
    byte_level = False
    for step in map(_object, steps):
        match step.get("type"):
            case "Split":
                patterns.append(_object(step.get("pattern")).get("Regex", ""))
            case "Digits" if step.get("individual_digits"):
                patterns.append(r"\p{N}")
            case "ByteLevel":
                byte_level = True
                if step.get("add_prefix_space"):
                    raise _unsupported("byte-level BPE with a space put before the text")
                if step.get("use_regex", True):
                    patterns += PRE_TOKENIZERS["gpt-2"].patterns
            case _:
                return None
    if not byte_level:
        return None
    # llama.cpp does not normalise: decomposed characters have other tokens there, all others the same.
    if _object(spec.get("normalizer")).get("type") not in (None, "NFC"):
        raise _unsupported("byte-level BPE behind a normalizer other than NFC")
    merged = bool(_object(spec.get("model")).get("ignore_merges"))
    for name, pre in PRE_TOKENIZERS.items():
        if pre.patterns == patterns and pre.ignore_merges == merged and pre.byte_level:
            return name
    raise _unsupported(f"byte-level BPE that splits text by {patterns}")


# SentencePiece


def _sentencepiece(
    model: sentencepiece.Model, vocabulary: Vocabulary, vocab_size: int
) -> dict[str, Any]:
    unigram = model.kind == sentencepiece.UNIGRAM
    if unigram == model.byte_fallback:
        raise _unsupported(
            "a Unigram model with bytes for what it lacks"
            if unigram
            else "a BPE model without a token for each byte"
        )
    if unigram and model.remove_extra_spaces and not model.dummy_prefix:
        raise _unsupported("a Unigram model that joins spaces and puts none before the text")
    table = _Table(vocab_size)
    # llama.cpp looks for user-defined tokens before it writes spaces as U+2581.
    for i, (text, score, kind) in enumerate(
        zip(model.tokens, model.scores, model.types, strict=True)
    ):
        own = kind == USER_DEFINED
        table.put(i, text.replace(SPACE, " ") if own else text, -1000.0 if own else score, kind)
    table.put_added(vocabulary, " ")
    keys = table.keys() | {
        "tokenizer.ggml.model": "t5" if unigram else "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": table.scores,
        "tokenizer.ggml.add_space_prefix": model.dummy_prefix,
    }
    if unigram:
        keys["tokenizer.ggml.remove_extra_whitespaces"] = model.remove_extra_spaces
        if model.charsmap:
            keys["tokenizer.ggml.precompiled_charsmap"] = model.charsmap
    return keys


def _from_json(spec: Mapping[str, Any]) -> sentencepiece.Model:
    """The SentencePiece model that a tokenizer.json was made from."""
    inner = _object(spec.get("model"))
    model = sentencepiece.Model(
        dummy_prefix=False, remove_extra_spaces=False, byte_fallback=bool(inner.get("byte_fallback"))
    )  # fmt: skip
    for part in ("normalizer", "pre_tokenizer"):
        top = _object(spec.get(part))
        for step in top.get("normalizers") or top.get("pretokenizers") or [top]:
            _read_step(model, _object(step))
    if inner.get("type") == "Unigram":
        model.kind = sentencepiece.UNIGRAM
        model.tokens = [token for token, _ in inner["vocab"]]
        model.scores = [float(score) for _, score in inner["vocab"]]
        unknown = inner.get("unk_id")
    elif inner.get("type") == "BPE":
        model.kind = sentencepiece.BPE
        vocab: dict[str, int] = inner["vocab"]
        model.tokens = sorted(vocab, key=vocab.__getitem__)
        if [vocab[token] for token in model.tokens] != list(range(len(vocab))):
            raise _unsupported("BPE whose ids have gaps")
        unknown = vocab.get(str(inner.get("unk_token")))
    else:
        raise _unsupported(f"a tokenizer.json of type {inner.get('type')!r:.40}")
    model.unk_id = unknown if isinstance(unknown, int) else -1
    added = {token["id"] for token in cast("list[dict[str, Any]]", spec.get("added_tokens") or [])}
    for i, token in enumerate(model.tokens):
        is_byte = model.byte_fallback and byte_of(token) is not None
        kind = UNKNOWN if i == model.unk_id else CONTROL if i in added else NORMAL
        model.types.append(BYTE if is_byte else kind)
    if model.kind == sentencepiece.BPE:
        _score_by_merges(model, inner["merges"])
    return model


def _read_step(model: sentencepiece.Model, step: Mapping[str, Any]) -> None:
    """One normalizer or pre-tokenizer, as the property of a SentencePiece model that it stands for."""
    match step:
        case {"type": "Prepend", "prepend": "\u2581"}:
            model.dummy_prefix = True
        case {"type": "Metaspace", "replacement": "\u2581"}:
            scheme = step.get(
                "prepend_scheme", "always" if step.get("add_prefix_space") else "never"
            )
            model.dummy_prefix = model.dummy_prefix or scheme != "never"
        case {"type": "Precompiled", "precompiled_charsmap": str(rules)}:
            model.charsmap = base64.b64decode(rules)
        case {"type": "WhitespaceSplit"} | {"type": "Replace", "pattern": {"Regex": " {2,}"}}:
            model.remove_extra_spaces = True
        case (
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
            | {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
            | {"type": "Strip"}
        ):  # fmt: skip
            pass
        case {"type": str(kind)}:
            raise _unsupported(f"a tokenizer.json with {kind} {step!r:.120}")
        case _:  # none
            pass


def _score_by_merges(model: sentencepiece.Model, merges: list[Any]) -> None:
    """Scores that rank whole tokens as the merges rank pairs.

    Raises:
        UnsupportedModelError: The merges were not made from scores.
    """
    normal = {t for t, kind in zip(model.tokens, model.types, strict=True) if kind == NORMAL}
    pairs = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in merges]
    # What is found in the text before anything is merged takes no part (Gemma's runs of spaces).
    pairs = [(a, b) for a, b in pairs if a in normal and b in normal and a + b in normal]
    wholes = [whole for whole, _ in groupby(left + right for left, right in pairs)]
    rank = {whole: -float(i) for i, whole in enumerate(wholes)}
    model.scores = [rank.get(token, -float(len(wholes))) for token in model.tokens]
    scores = {token: rank.get(token, -float(len(wholes))) for token in normal}
    if len(rank) != len(wholes) or set(merges_from_scores(scores)) != set(pairs):
        raise _unsupported(
            "BPE whose merges do not rank whole tokens, as those of SentencePiece do; with its tokenizer.model in the "
            "directory that is taken instead"
        )


# What both have


def _special(vocabulary: Vocabulary, templates: Mapping[str, str]) -> dict[str, Any]:
    """Ids of special tokens, what is put around a text, chat templates."""
    eos = vocabulary.id_of(vocabulary.names.get("eos_token", ""))
    ids = {
        "bos": vocabulary.bos_id,
        "eos": eos,
        "unknown": vocabulary.unk_id,
        "padding": vocabulary.pad_id,
    }
    found: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None
    }
    found["tokenizer.ggml.add_bos_token"] = bool(vocabulary.prefix)
    found["tokenizer.ggml.add_eos_token"] = bool(vocabulary.suffix)
    for name, source in templates.items():
        key = "tokenizer.chat_template"
        found[key if name == "default" else f"{key}.{name}"] = source
    if named := [name for name in templates if name != "default"]:
        found["tokenizer.chat_templates"] = named
    return found


def _object(value: Any) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"convert: GGUF has no words for {what}; {_WAY_OUT}")

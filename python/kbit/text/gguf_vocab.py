"""Tokenizers from the metadata of a GGUF file, built on `tokenizers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from kbit._core import ModelFormatError, UnsupportedModelError
from kbit.text import sentencepiece
from kbit.text.merges import merges_from_scores
from kbit.text.pieces import SPACE, Pieces, spaces, word_piece
from kbit.text.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    ControlToken,
    Vocabulary,
    check_tokens,
    typed_failures,
)  # fmt: skip

END_OF_TURN = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>", "<|eom_id|>", "<|return|>", "<|call|>",
)  # fmt: skip
"""Texts of control tokens that end an answer, for files that name no such token."""

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_PUNCT = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


def _cl100k(
    digits: str, letters: str = r"\p{L}+", other: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
) -> str:
    """The family of GPT-4's first pattern."""
    return rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}|{other}|{_SPACES}"


def _o200k(digits: str, contractions: str) -> str:
    """The family of GPT-4o's pattern: words split where lower case turns to upper case."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{_UPPER}*{_LOWER}+{contractions}|{lead}{_UPPER}+{_LOWER}*{contractions}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_LLAMA3 = [_cl100k(r"\p{N}{1,3}")]
_QWEN2 = [_cl100k(r"\p{N}")]
_STARCODER = [r"\p{N}", _GPT2]
_DEEPSEEK3_WORDS = (
    rf"{_ASCII_PUNCT}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_DEEPSEEK3 = [r"\p{N}{1,3}", _CJK, _DEEPSEEK3_WORDS]
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_GPT4O = [_o200k(r"\p{N}{1,3}", f"(?i:{_CONTRACTIONS})?")]
_LINES = ["[^\n]+|[\n]+"]
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_EXAONE_MOE = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_NO_HAN = (_UPPER[:-1] + r"&&[^\p{Han}]]", _LOWER[:-1] + r"&&[^\p{Han}]]")
_KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN[0]}*{_NO_HAN[1]}+(?i:{_CONTRACTIONS})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN[0]}+{_NO_HAN[1]}*(?i:{_CONTRACTIONS})?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_JAIS2 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}"
)
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    f"|[\u3105-\u312f]+|{_CJK}"
)
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff"
    "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)


@dataclass(frozen=True)
class Pre:
    """A pre-tokenizer name of GGUF: patterns applied one after the other, and what else the name implies.

    Attributes:
        patterns: Each splits every piece left by the one before.
        ignore_merges: A word that is a token is taken whole.
        add_bos: The default where the file does not say.
        byte_level: Words are written in GPT-2's byte alphabet; otherwise spaces become U+2581, as in SentencePiece.
    """

    patterns: list[str]
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True


def _pre_table() -> dict[str, Pre]:
    groups: list[tuple[str, Pre]] = [
        ("default", Pre([r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"])),
        ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", Pre(_LLAMA3, True, True)),
        ("dbrx smaug-bpe glm4 chatglm-bpe", Pre(_LLAMA3)),
        ("minicpm5", Pre([r"\p{N}{1,3}", _cl100k(r"\p{N}+")], True)),
        ("jais-2", Pre([_JAIS2])),
        ("deepseek-llm", Pre([
            "[\r\n]", rf"\s?[{_DEEPSEEK_CASED}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$", _DEEPSEEK_HAN, r"\p{N}+"])),
        ("deepseek-coder", Pre(["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}"])),
        ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Pre(_DEEPSEEK3)),
        ("spark2_5", Pre([
            r"\p{N}{1,3}", _CJK, _DEEPSEEK3_WORDS.replace(r"[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+", r"[\p{P}\p{S}]+|[\r\n]"),
            r"\p{N}"])),
        ("youtu", Pre([_YOUTU, _o200k(r"\p{N}", f"(?i:{_CONTRACTIONS})?")], True)),
        ("falcon", Pre([r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"])),
        ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", Pre(_STARCODER)),
        ("gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe gigachat "
         "a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4", Pre([_GPT2])),
        ("stablelm2 qwen2 deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open grok-2", Pre(_QWEN2)),
        ("qwen35", Pre([_cl100k(r"\p{N}", r"[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")])),
        ("seed-coder", Pre([_cl100k(r"\p{N}{1}", other=r" ?[^\s\p{L}\p{N}\r\n]+")])),
        ("ufakzeka", Pre([_QWEN2[0].removeprefix(f"(?i:{_CONTRACTIONS})|")])),
        ("poro-chat bloom gpt3-finnish", Pre([_BLOOM])),
        ("viking", Pre([_BLOOM, r"\p{N}"])),
        ("tekken", Pre([_o200k(r"\p{N}", "")], True, True)),
        ("chameleon", Pre([
            "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\t\n]|    |  )", r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]", _GPT2], add_bos=True)),
        ("gpt-4o llama4 kanana2 talkie minimax-m2", Pre(_GPT4O)),
        ("granite-embed-multi-97m", Pre(_GPT4O, True)),
        ("tiny_aya cohere2moe", Pre([r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O])),
        ("superbpe", Pre([r"\p{N}+", r"(?=(\d{3})+(?!\d))"])),
        ("bailingmoe bailingmoe2 llada-moe", Pre([
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"])),
        ("kimi-k2", Pre([_KIMI])),
        ("afmoe", Pre([r"\p{Nd}{1,3}(?=(?:\p{Nd}{3})*(?!\p{Nd}))", _AFMOE_ASIAN, _DEEPSEEK3_WORDS])),
        ("laguna", Pre([*_LINES, *_QWEN2])),
        ("exaone-moe", Pre([_EXAONE_MOE])),
        ("gemma4 granite-embed-multi-311m sarvam-moe", Pre(_LINES, byte_level=False)),
    ]  # fmt: skip
    return {name: pre for names, pre in groups for name in names.split()}


PRE_TOKENIZERS = _pre_table()
"""Every name of `tokenizer.ggml.pre` that kbit knows."""
PATTERNS = frozenset(pattern for pre in PRE_TOKENIZERS.values() for pattern in pre.patterns)
"""Patterns of published tokenizers: taken as they are, also from a tokenizer.json."""


class Metadata:
    """The keys `tokenizer.ggml.*`, typed."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        tokens = self._strings("tokens")
        # A token of no characters has no text to match; llama.cpp gives it a name as well.
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        check_tokens(self.tokens, "tokenizer.ggml.tokens")
        count = len(self.tokens)
        self.scores = self._numbers("scores", count, 0.0)
        self.types = [int(kind) for kind in self._numbers("token_type", count, NORMAL)]

    def get(self, key: str) -> Any:
        """The value of a key, None where it is absent."""
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ModelFormatError(
                f"tokenizer.ggml.{key} is a {type(value).__name__}, not a string"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelFormatError(f"tokenizer.ggml.{key} is a {type(value).__name__}, not a bool")
        return value

    def token_id(self, *keys: str) -> int | None:
        """The id under the first key that has one; an id outside the vocabulary (writers use 2**32 - 1) is no id."""
        for key in keys:
            value = self.get(f"{key}_token_id")
            if (
                isinstance(value, int)
                and not isinstance(value, bool)
                and 0 <= value < len(self.tokens)
            ):
                return value
        return None

    def ids_of(self, kind: int) -> list[int]:
        """Ids of one type."""
        return [i for i, each in enumerate(self.types) if each == kind]

    def merges(self) -> list[tuple[str, str]]:
        """The merge list, each written as two tokens with a space between."""
        merges: list[tuple[str, str]] = []
        for i, merge in enumerate(self._strings("merges")):
            left, space, right = merge[:1], "", ""
            at = merge.find(" ", 1)
            if at > 0:
                left, space, right = merge[:at], " ", merge[at + 1 :]
            if not space or not right:
                raise ModelFormatError(
                    f"tokenizer.ggml.merges[{i}] is {merge!r}, not two tokens with a space between"
                )
            merges.append((left, right))
        return merges

    def _strings(self, key: str) -> list[str]:
        value: Any = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(
            type(each) is str for each in cast("list[Any]", value)
        ):
            raise ModelFormatError(f"tokenizer.ggml.{key} is not an array of strings")
        return cast("list[str]", value)

    def _numbers(self, key: str, count: int, default: float) -> list[float]:
        value = self.get(key)
        if value is None:
            return [default] * count
        if not hasattr(value, "__len__") or isinstance(value, str) or len(value) != count:
            size = len(value) if hasattr(value, "__len__") else value
            raise ModelFormatError(f"tokenizer.ggml.{key} has {size} entries for {count} tokens")
        numbers = [float(each) if isinstance(each, int | float) else float("nan") for each in value]
        if any(each != each for each in numbers):
            raise ModelFormatError(f"tokenizer.ggml.{key} holds something that is not a number")
        return numbers


def read(metadata: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer of a GGUF file.

    Raises:
        ModelFormatError: Keys are missing, of the wrong type, or contradict each other.
        UnsupportedModelError: A kind of vocabulary or pre-tokenizer that kbit does not know.
    """
    meta = Metadata(metadata)
    model = meta.text("model", "")
    read_kind = {
        "llama": _spm,
        "gpt2": _bpe,
        "gemma4": _bpe,
        "bert": _wordpiece,
        "t5": _unigram,
    }.get(model)
    if read_kind is None:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model is {model!r}; kbit reads llama (SentencePiece BPE), gpt2 (byte-level BPE), gemma4, "
            "bert (WordPiece) and t5 (Unigram)"
        )
    with typed_failures("tokenizer.ggml"):
        vocabulary = read_kind(meta)
    control = sorted(meta.ids_of(CONTROL) + meta.ids_of(UNKNOWN))
    vocabulary.control = [ControlToken(i, meta.tokens[i]) for i in control]
    vocabulary.unk_id = meta.token_id("unknown")
    vocabulary.pad_id = meta.token_id("padding")
    vocabulary.eos_ids = _ends(meta)
    named = {
        "bos": vocabulary.bos_id,
        "eos": meta.token_id("eos"),
        "unk": vocabulary.unk_id,
        "pad": vocabulary.pad_id,
    }
    vocabulary.names = {
        f"{name}_token": meta.tokens[i] for name, i in named.items() if i is not None
    }
    return vocabulary


def _ends(meta: Metadata) -> list[int]:
    """Ids that end an answer: those the file names, then control tokens known by their text."""
    ends = {i for key in ("eos", "eot", "eom") if (i := meta.token_id(key)) is not None}
    known = set(END_OF_TURN)
    ends |= {
        i for i, token in enumerate(meta.tokens) if token in known and meta.types[i] == CONTROL
    }
    return sorted(ends)


def _add_tokens(core: tokenizers.Tokenizer, meta: Metadata) -> None:
    """Control tokens are parsed from text on request, user-defined ones always."""
    own = meta.ids_of(USER_DEFINED)
    control = sorted(meta.ids_of(CONTROL) + meta.ids_of(UNKNOWN))
    tokens = [AddedToken(token, normalized=False) for token in meta.tokens]
    core.add_tokens([tokens[i] for i in own])  # pyright: ignore[reportUnknownMemberType]
    core.add_special_tokens([tokens[i] for i in control])  # pyright: ignore[reportUnknownMemberType]


def _affixes(
    meta: Metadata, vocabulary: Vocabulary, add_bos: bool, add_eos: bool, default_bos: int | None
) -> None:
    vocabulary.bos_id = bos = (
        meta.token_id("bos") if meta.get("bos_token_id") is not None else default_bos
    )
    eos = meta.token_id("eos")
    if meta.flag("add_bos_token", add_bos) and bos is not None:
        vocabulary.prefix = [bos]
    if meta.flag("add_eos_token", add_eos) and eos is not None:
        vocabulary.suffix = [eos]


def _spm(meta: Metadata) -> Vocabulary:
    """SentencePiece BPE as llama.cpp runs it: spaces become U+2581, one is put before each stretch of text."""
    scores = {
        token: score
        for token, score, kind in zip(meta.tokens, meta.scores, meta.types, strict=True)
        if kind not in (CONTROL, UNKNOWN, BYTE, USER_DEFINED)
    }
    vocab = {token: i for i, token in enumerate(meta.tokens)}
    unknown = meta.ids_of(UNKNOWN)
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab, merges_from_scores(scores), byte_fallback=bool(meta.ids_of(BYTE)), fuse_unk=True,
            unk_token=meta.tokens[unknown[0]] if unknown else None,
        )
    )  # fmt: skip
    prefix = meta.flag("add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), *steps] if prefix else steps
    )
    _add_tokens(core, meta)
    pieces = Pieces(byte_fallback=True, steps=(spaces,), strip=(" ", int(prefix)))
    vocabulary = Vocabulary(core, pieces)
    _affixes(meta, vocabulary, True, False, 1 if len(meta.tokens) > 1 else None)
    return vocabulary


def _bpe(meta: Metadata) -> Vocabulary:
    name = "gemma4" if meta.text("model", "") == "gemma4" else meta.text("pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(f"tokenizer.ggml.pre is {name!r}; kbit knows {known}")
    vocab = {token: i for i, token in enumerate(meta.tokens)}
    merges = meta.merges()
    if not merges:
        special = {*meta.ids_of(CONTROL), *meta.ids_of(UNKNOWN), *meta.ids_of(USER_DEFINED)}
        merges = merges_from_scores(
            {token: -float(i) for i, token in enumerate(meta.tokens) if i not in special}
        )
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise ModelFormatError(
                    f"tokenizer.ggml.merges joins {left!r} and {right!r}, but {token!r} is not a token"
                )
    core = tokenizers.Tokenizer(
        models.BPE(vocab, merges, ignore_merges=pre.ignore_merges, byte_fallback=not pre.byte_level)
    )
    splits: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns
    ]
    if pre.byte_level:
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    else:
        core.normalizer = normalizers.Replace(" ", SPACE)
    core.pre_tokenizer = pre_tokenizers.Sequence(splits)
    _add_tokens(core, meta)
    pieces = (
        Pieces(byte_level=True) if pre.byte_level else Pieces(byte_fallback=True, steps=(spaces,))
    )
    vocabulary = Vocabulary(core, pieces)
    _affixes(meta, vocabulary, pre.add_bos, False, None)
    return vocabulary


def _wordpiece(meta: Metadata) -> Vocabulary:
    """BERT's WordPiece. GGUF writes the start of a word as U+2581 where BERT's files write ``##`` for its inside."""
    marked = any(token.startswith(SPACE) for token in meta.tokens)
    special = {*meta.ids_of(CONTROL), *meta.ids_of(UNKNOWN)}
    words = meta.tokens
    if marked:
        words = [
            token if i in special else token[1:] if token.startswith(SPACE) else "##" + token
            for i, token in enumerate(meta.tokens)
        ]
        check_tokens(words, "tokenizer.ggml.tokens")
    unknown = meta.token_id("unknown")
    if unknown is None:
        raise ModelFormatError(
            "tokenizer.ggml.unknown_token_id is missing: WordPiece needs a token for unknown words"
        )
    vocab = {word: i for i, word in enumerate(words)}
    core = tokenizers.Tokenizer(
        models.WordPiece(vocab, unk_token=words[unknown], max_input_chars_per_word=100)
    )
    lowercase = meta.flag("normalizer.lowercase", True)
    core.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=meta.flag("normalizer.strip_accents", lowercase)
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _add_tokens(core, meta)
    vocabulary = Vocabulary(core, word_piece("##", tidy=True))
    first = meta.token_id("cls", "bos")
    last = meta.token_id("seperator", "separator", "eos")
    vocabulary.bos_id = first
    vocabulary.prefix = [first] if first is not None and meta.flag("add_bos_token", True) else []
    vocabulary.suffix = [last] if last is not None and meta.flag("add_eos_token", True) else []
    return vocabulary


def _unigram(meta: Metadata) -> Vocabulary:
    """SentencePiece Unigram."""
    rules = meta.get("precompiled_charsmap")
    if rules is not None and not isinstance(rules, bytes):
        try:
            rules = bytes([int(each) & 0xFF for each in rules])
        except (TypeError, ValueError):
            raise ModelFormatError(
                "tokenizer.ggml.precompiled_charsmap is not an array of bytes"
            ) from None
    unknown = meta.token_id("unknown")
    vocabulary = sentencepiece.build(
        sentencepiece.Model(
            sentencepiece.UNIGRAM, meta.tokens, meta.scores, meta.types, charsmap=rules or b"",
            dummy_prefix=meta.flag("add_space_prefix", True),
            remove_extra_spaces=meta.flag("remove_extra_whitespaces", True),
            byte_fallback=len(meta.ids_of(BYTE)) == 256, unk_id=-1 if unknown is None else unknown,
        )
    )  # fmt: skip
    _affixes(meta, vocabulary, False, True, None)
    return vocabulary

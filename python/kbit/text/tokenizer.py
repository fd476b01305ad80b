"""The tokenizer: text to ids and back, whatever kind of file it came from."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from kbit._core import ModelFormatError
from kbit.text import gguf_vocab, hf_json, pieces
from kbit.text.gguf_vocab import Vocabulary
from kbit.text.stream import StreamDecoder


class Tokenizer:
    """Text to token ids and back. Safe to share between threads.

    Attributes:
        bos_id: The token that begins a text; None where the model has none.
        eos_ids: Tokens that end an answer, from generation_config.json, config.json and the tokenizer itself.
        prefix: Ids that `encode` puts before a text (usually ``[bos_id]`` or nothing).
        suffix: Ids that `encode` puts after a text (nothing for a decoder).
        chat_template: Source of the default chat template; None where there is none.
        chat_templates: All templates by name.
    """

    def __init__(self, vocabulary: Vocabulary, chat_templates: Mapping[str, str] | None = None) -> None:
        self._core = vocabulary.core
        self._lock = threading.Lock()
        self._bytes: dict[tuple[int, bool], bytes] = {}
        self.pieces = vocabulary.pieces
        self.special_ids = vocabulary.special_ids
        self.bos_id = vocabulary.bos_id
        self.unk_id = vocabulary.unk_id
        self.pad_id = vocabulary.pad_id
        self.eos_ids = tuple(vocabulary.eos_ids)
        self.prefix = list(vocabulary.prefix)
        self.suffix = list(vocabulary.suffix)
        self.chat_templates = dict(chat_templates or {})
        ids = self._core.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template."""
        return self.chat_templates.get("default")

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory.

        Raises:
            ModelFormatError: A file breaks its format, or there is no tokenizer.
            UnsupportedModelError: A decoder that kbit does not know.
            OSError: A file cannot be read.
        """
        root = Path(path)
        file = root / "tokenizer.json"
        spec = hf_json.read_json(file)
        if spec is None:
            raise ModelFormatError(f"{root}: no tokenizer.json")
        config = hf_json.read_json(root / "tokenizer_config.json") or {}
        vocabulary = _from_json(spec, hf_json.build(file.read_bytes()), config, root)
        return cls(vocabulary, _templates(root, config))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata.

        Raises:
            ModelFormatError: Keys are missing, of the wrong type, or contradict each other.
            UnsupportedModelError: A kind of vocabulary or pre-tokenizer that kbit does not know.
        """
        templates = {"default": metadata["tokenizer.chat_template"]} if "tokenizer.chat_template" in metadata else {}
        for name in metadata.get("tokenizer.chat_templates", []):
            source = metadata.get(f"tokenizer.chat_template.{name}")
            if isinstance(source, str):
                templates.setdefault(str(name), source)
        return cls(gguf_vocab.read(metadata), templates)

    def encode(self, text: str, *, special: bool = False, add_bos: bool | None = None) -> NDArray[np.uint32]:
        """Token ids of `text`, (n,) uint32.

        Args:
            text: Any str. Surrogate pairs become the character they mean, a lone surrogate becomes U+FFFD.
            special: Text such as ``<|im_start|>`` becomes the control token it names. Off by default: what a user
                writes is text.
            add_bos: Put `prefix` and `suffix` around the ids. None: as the model wants. A prefix that the text already
                wrote itself is never doubled.
        """
        ids = self._encode(well_formed(text), special)
        if add_bos or add_bos is None:
            prefix = self.prefix
            if add_bos and not prefix and self.bos_id is not None:
                prefix = [self.bos_id]
            if ids[: len(prefix)] != prefix:
                ids = prefix + ids
            if self.suffix and ids[-len(self.suffix) :] != self.suffix:
                ids = ids + self.suffix
        return np.asarray(ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`.

        Bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary (padded rows of an embedding) nothing.

        Args:
            ids: Token ids.
            special: Control tokens give their text instead of nothing.
        """
        stream = StreamDecoder(self, special=special)
        return "".join([stream.push(int(i)) for i in ids]) + stream.finish()

    def token_bytes(self, token_id: int, *, special: bool = True, first: bool = False) -> bytes | None:
        """Bytes of one token; None for an id outside the vocabulary, or a control token unless `special`.

        Args:
            token_id: The token.
            special: Control tokens give their text.
            first: As the first token of a text, where some vocabularies drop a space.

        Raises:
            ValueError: A negative id.
        """
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        if token_id in self.special_ids and not special:
            return None
        known = self._bytes.get((token_id, first))
        if known is None:
            token = self._core.id_to_token(token_id) if token_id < self.vocab_size else None
            if token is None:
                return None
            known = token.encode() if token_id in self.special_ids else self.pieces.of(token, first=first)
            self._bytes[token_id, first] = known
        return known

    def token(self, token_id: int) -> str | None:
        """How the vocabulary writes a token; None outside it."""
        return self._core.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def token_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary writes it."""
        return self._core.token_to_id(token)

    def _encode(self, text: str, special: bool) -> list[int]:
        with self._lock:  # the switch belongs to the shared object
            self._core.encode_special_tokens = not special
            return self._core.encode(text, add_special_tokens=False).ids


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _from_json(spec: dict[str, Any], core: tokenizers.Tokenizer, config: dict[str, Any], root: Path) -> Vocabulary:
    special = {int(t["id"]) for t in spec.get("added_tokens") or [] if t.get("special")}
    vocabulary = Vocabulary(core, pieces.from_json(spec.get("decoder")), special_ids=frozenset(special))
    vocabulary.prefix, vocabulary.suffix = _affixes(core)
    for name in ("bos", "unk", "pad"):
        token = _token_text(config.get(f"{name}_token"))
        setattr(vocabulary, f"{name}_id", None if token is None else core.token_to_id(token))
    if config.get("add_bos_token") is False and vocabulary.prefix == [vocabulary.bos_id]:
        vocabulary.prefix = []
    if config.get("add_bos_token") is True and not vocabulary.prefix and vocabulary.bos_id is not None:
        vocabulary.prefix = [vocabulary.bos_id]
    ends: list[int] = []
    eos = _token_text(config.get("eos_token"))
    if eos is not None and (i := core.token_to_id(eos)) is not None:
        ends.append(i)
    generation = hf_json.read_json(root / "generation_config.json") or {}
    model = hf_json.read_json(root / "config.json") or {}
    for source in (generation, model):
        value = source.get("eos_token_id")
        ends += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    vocabulary.eos_ids = sorted(set(ends))
    return vocabulary


def _token_text(value: Any) -> str | None:
    """A special token in a config: a string, or an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _affixes(core: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text, seen on one word."""
    plain: Sequence[int] = core.encode("a", add_special_tokens=False).ids
    full: list[int] = core.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == list(plain):
            return full[:start], full[start + len(plain) :]
    return [], []


def _templates(root: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates of a directory: tokenizer_config.json, then the files that newer checkpoints carry instead."""
    templates: dict[str, str] = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        for each in value:
            if isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str):
                templates[each["name"]] = each["template"]
    for name, path in [("default", root / "chat_template.jinja"), *_named_templates(root)]:
        if path.is_file():
            templates[name] = path.read_bytes().decode("utf-8", "strict")
    return templates


def _named_templates(root: Path) -> list[tuple[str, Path]]:
    return [(path.stem, path) for path in sorted((root / "additional_chat_templates").glob("*.jinja"))]

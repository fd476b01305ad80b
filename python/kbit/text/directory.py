"""The tokenizer of a Hugging Face directory, from all the files that have a say in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken

from kbit._core import ModelFormatError
from kbit.text import hf_json, pieces, sentencepiece
from kbit.text.kinds import MAX_SOURCE, is_dict
from kbit.text.vocabulary import ControlToken, Vocabulary, typed_failures

SENTENCEPIECE = ("tokenizer.model", "spiece.model")
"""Names of the file of a SentencePiece model."""
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def read(root: Path) -> tuple[Vocabulary, dict[str, str]]:
    """The tokenizer and the chat templates of a directory; see `Tokenizer.from_dir`."""
    config = hf_json.read_json(root / "tokenizer_config.json") or {}
    named = _names(hf_json.read_json(root / "special_tokens_map.json") or {}) | _names(config)
    file = root / "tokenizer.json"
    data = hf_json.read_bytes(file)
    if data is not None:
        vocabulary = _from_json(hf_json.parse_json(data, file.name), data)
    else:
        vocabulary = _from_model(root, config, named)
    _name(vocabulary, named)
    _affix(vocabulary, config)
    _ends(vocabulary, root)
    return vocabulary, _templates(root, config)


def _from_json(spec: dict[str, Any], data: bytes) -> Vocabulary:
    hf_json.check(spec)
    core = hf_json.build(data)
    vocabulary = Vocabulary(core, pieces.from_json(spec.get("decoder")))
    added = cast("list[dict[str, Any]]", spec.get("added_tokens") or [])
    vocabulary.control = [
        ControlToken(
            token["id"], token["content"], bool(token.get("lstrip")), bool(token.get("rstrip"))
        )
        for token in added
        if token.get("special")
    ]
    vocabulary.prefix, vocabulary.suffix = _surroundings(core)
    if '"prepend_scheme":"first"' in (
        pre := json.dumps(spec.get("pre_tokenizer"), separators=(",", ":"))
    ):
        inner = {
            **spec,
            "pre_tokenizer": json.loads(
                pre.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
            ),
        }
        vocabulary.inner = hf_json.build(json.dumps(inner).encode())
    return vocabulary


def _surroundings(core: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text, seen on one letter."""
    with typed_failures("tokenizer.json"):
        plain = core.encode("a", add_special_tokens=False).ids
        full = core.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _from_model(root: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> Vocabulary:
    for name in SENTENCEPIECE:
        data = hf_json.read_bytes(root / name)
        if data is not None:
            break
    else:
        raise ModelFormatError(f"{root}: no tokenizer.json and no tokenizer.model (SentencePiece)")
    vocabulary = sentencepiece.build(sentencepiece.parse(data))
    _add_tokens(vocabulary, root, config)
    kind = str(config.get("tokenizer_class", ""))
    ends_texts = kind.startswith(("T5", "MT5", "Pegasus"))
    if vocabulary.bos_id is not None and not ends_texts:
        vocabulary.prefix = [vocabulary.bos_id]
    if ends_texts or config.get("add_eos_token") is True:
        vocabulary.suffix = vocabulary.eos_ids[:1]
    return vocabulary


def _add_tokens(vocabulary: Vocabulary, root: Path, config: Mapping[str, Any]) -> None:
    """Tokens beside a SentencePiece model: those of added_tokens.json and of the config, which says more of each."""
    added: dict[int, AddedToken] = {}
    for text, token_id in (hf_json.read_json(root / "added_tokens.json") or {}).items():
        if isinstance(token_id, int):
            added[token_id] = AddedToken(text, normalized=False, special=True)
    listed = config.get("added_tokens_decoder")
    for key, token in listed.items() if is_dict(listed) else ():
        text = token.get("content") if is_dict(token) else None
        if isinstance(text, str) and key.isdecimal() and len(key) < 10:
            flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "special")}
            added[int(key)] = AddedToken(text, normalized=False, **flags)
    core = vocabulary.core
    known = {token.id for token in vocabulary.control}
    for token_id, token in sorted(added.items()):
        if vocabulary.id_of(token.content) is None:
            size = core.get_vocab_size(with_added_tokens=True)
            if token_id != size:
                raise ModelFormatError(
                    f"added token {token.content!r} has id {token_id}; the next free one is {size}"
                )
            core.add_tokens([token])  # pyright: ignore[reportUnknownMemberType]
        if token.special and token_id not in known:
            vocabulary.control.append(
                ControlToken(token_id, token.content, token.lstrip, token.rstrip)
            )


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens in a config: strings, or objects with their content."""
    found: dict[str, str] = {}
    for name in _NAMES:
        value: Any = config.get(f"{name}_token")
        if isinstance(value, dict):
            value = cast("dict[str, Any]", value).get("content")
        if isinstance(value, str):
            found[f"{name}_token"] = value
    return found


def _name(vocabulary: Vocabulary, named: Mapping[str, str]) -> None:
    vocabulary.names |= named
    for name in ("bos", "unk", "pad"):
        text = named.get(f"{name}_token")
        if text is not None:
            setattr(vocabulary, f"{name}_id", vocabulary.id_of(text))


def _affix(vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
    """The config's `add_bos_token` holds against what the tokenizer says of itself."""
    bos, wanted = vocabulary.bos_id, config.get("add_bos_token")
    if wanted is False and bos is not None and vocabulary.prefix == [bos]:
        vocabulary.prefix = []
    if wanted is True and bos is not None and not vocabulary.prefix:
        vocabulary.prefix = [bos]


def _ends(vocabulary: Vocabulary, root: Path) -> None:
    """Ids that end an answer: what generation_config.json, config.json and the tokenizer say, all of them."""
    ends = set(vocabulary.eos_ids)
    eos = vocabulary.names.get("eos_token")
    if eos is not None and (token_id := vocabulary.id_of(eos)) is not None:
        ends.add(token_id)
    for name in ("generation_config.json", "config.json"):
        value = (hf_json.read_json(root / name) or {}).get("eos_token_id")
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        ends |= {i for i in values if type(i) is int and i >= 0}
    vocabulary.eos_ids = sorted(ends)


def _templates(root: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates: those of tokenizer_config.json, then the files that newer checkpoints carry instead."""
    templates: dict[str, str] = {}
    for source in (config, hf_json.read_json(root / "chat_template.json") or {}):
        value = source.get("chat_template")
        if isinstance(value, str):
            templates["default"] = value
        for each in cast("list[Any]", value) if isinstance(value, list) else []:
            match each:
                case {"name": str(name), "template": str(template)}:
                    templates[name] = template
                case _:
                    raise ModelFormatError(
                        f"chat_template holds {each!r:.80}, not a name and a template"
                    )
    named = [
        (path.stem, path) for path in sorted((root / "additional_chat_templates").glob("*.jinja"))
    ]
    for name, path in [("default", root / "chat_template.jinja"), *named]:
        if path.is_file():
            if path.stat().st_size > 4 * MAX_SOURCE:
                raise ModelFormatError(
                    f"{path.name}: {path.stat().st_size} bytes; at most {4 * MAX_SOURCE} are read"
                )
            try:
                templates[name] = path.read_bytes().decode()
            except UnicodeDecodeError as error:
                raise ModelFormatError(f"{path.name}: not UTF-8: {error}") from None
    return templates

"""Architectures as data: one module for each, named after its `model_type`, found by being here."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from kbit._core import ModelFormatError, TensorFile, UnsupportedModelError
from kbit.archs._gguf import Gguf, gguf_config, gguf_names
from kbit.config import Config, Unread
from kbit.names import NameMap, Source, resolve
from kbit.spec import ModelSpec


@dataclass(frozen=True)
class Architecture:
    """One module of this package."""

    model_type: str
    """As in `config.json`; the module's name."""
    summary: str
    """What is special about it, in one sentence."""
    classes: tuple[str, ...]
    """Hugging Face class names in `architectures`."""
    spec: Callable[[Config], ModelSpec]
    """From hyper-parameters to the model."""
    names: NameMap
    """From Hugging Face tensor names to canonical ones."""
    gguf: Gguf | None
    """How llama.cpp's files say it; None: it has none."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint's config says."""

    architecture: Architecture
    spec: ModelSpec
    names: NameMap
    """Of this kind of file."""
    tied: bool | None
    """Whether the head is the embedding; None: unsaid, if the checkpoint has no head."""
    unread: Unread
    """Keys that the spec does not depend on."""

    def sources(self, tensors: Iterable[str]) -> dict[str, Source]:
        """The source of every canonical tensor among a checkpoint's tensor names.

        Raises:
            ModelFormatError: A tensor has no place, or a place has no tensor.
        """
        return resolve(self.names, self.spec, tensors, tied=self.tied)


@cache
def registry() -> dict[str, Architecture]:
    """All architectures by `model_type`, sorted."""
    found: dict[str, Architecture] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name.startswith("_"):
            continue
        module: Any = importlib.import_module(f"{__name__}.{module_info.name}")
        found[module_info.name] = Architecture(
            model_type=module_info.name,
            summary=(module.__doc__ or "").strip(),
            classes=module.ARCHITECTURES,
            spec=module.spec,
            names=module.NAMES,
            gguf=getattr(module, "GGUF", None),
        )
    return dict(sorted(found.items()))


def find(model_type: Any, classes: Any = None) -> Architecture:
    """The architecture of a `model_type`, or of one of the Hugging Face `classes`.

    Raises:
        UnsupportedModelError: There is none; the sentence names the nearest and how to add one.
    """
    known = registry()
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    names = cast("list[Any]", classes) if isinstance(classes, list) else []
    for architecture in known.values():
        if model_type is None and any(name in architecture.classes for name in names):
            return architecture
    wanted = str(model_type or ", ".join(map(str, names)) or "unnamed")[:80]
    nearest = difflib.get_close_matches(wanted, known, n=1, cutoff=0.0)
    raise UnsupportedModelError(
        f"kbit has no architecture {wanted!r}; the nearest is {nearest[0]!r} of "
        f"{len(known)}: {', '.join(known)}. "
        "An architecture is one page of data: see docs/adding.md"
    )


def describe(config: Mapping[str, Any], *, strict: bool = False) -> Description:
    """What a parsed `config.json` says.

    Args:
        config: The parsed file.
        strict: Refuse keys that kbit does not know.

    Raises:
        ModelFormatError: A value is missing or out of range.
        UnsupportedModelError: No such architecture, or an unread key that changes the result.
    """
    architecture = find(config.get("model_type"), config.get("architectures"))
    view = Config(config)
    spec = architecture.spec(view)
    unread = view.unread()
    if strict and unread.unknown:
        raise UnsupportedModelError(
            f"config has keys that kbit does not know: {', '.join(unread.unknown)}"
        )
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise ModelFormatError(
            f"config: tie_word_embeddings must be true or false, is {tied!r:.80}"
        )
    return Description(architecture, spec, architecture.names, tied, unread)


def describe_gguf(files: Sequence[TensorFile]) -> Description:
    """What the metadata of a GGUF file say, or of the first of a split one.

    Raises:
        ModelFormatError: A value is missing or out of range.
        UnsupportedModelError: No such architecture.
    """
    metadata = files[0].metadata
    name = metadata.get("general.architecture")
    experts = bool(metadata.get(f"{name}.expert_count"))
    known = [a for a in registry().values() if a.gguf]
    same = [a for a in known if a.gguf and a.gguf.name == name]
    chosen = [a for a in same if a.gguf and a.gguf.experts == experts] or same
    if not chosen:
        names = sorted({a.gguf.name for a in known if a.gguf})
        raise UnsupportedModelError(f"GGUF: kbit has no {name!r:.80}; it has {', '.join(names)}")
    architecture = chosen[0]
    gguf = cast("Gguf", architecture.gguf)
    view = Config(gguf_config(gguf, files))
    spec = architecture.spec(view)
    names = gguf_names(gguf, architecture.names)
    return Description(architecture, spec, names, None, view.unread())

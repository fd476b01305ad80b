"""Files that hold a model: which ones belong together, and kbit's own saved directory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from kbit import _core
from kbit._core import ModelFormatError, TensorFile, Weight
from kbit.text.hf_json import read_json

if TYPE_CHECKING:
    from kbit.spec import ModelSpec

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FORMAT_KEY = "kbit.format"
GGUF_TOKENIZER = "tokenizer.gguf.json"
"""The tokenizer keys of a GGUF file, in a directory saved from one."""

_TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "spiece.model",
    "added_tokens.json", GGUF_TOKENIZER,
    "chat_template.jinja", "additional_chat_templates", "generation_config.json",
)  # fmt: skip
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Source:
    """The files of a model, opened."""

    path: Path
    """A directory, or the (first) file."""
    files: tuple[TensorFile, ...]
    """One, or the shards in order."""

    @property
    def is_gguf(self) -> bool:
        """Whether everything, tokenizer included, is in GGUF files."""
        return self.files[0].format == "gguf"

    @property
    def is_saved(self) -> bool:
        """Whether kbit wrote it."""
        return not self.is_gguf and FORMAT_KEY in self.files[0].metadata

    @property
    def directory(self) -> Path:
        """Where the files beside the weights are."""
        return self.path if self.path.is_dir() else self.path.parent

    def tensors(self) -> dict[str, TensorFile]:
        """The file of every tensor.

        Raises:
            ModelFormatError: A name in two files.
        """
        found: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.names():
                if name in found:
                    raise ModelFormatError(
                        f"tensor {name} is in {found[name].path} and in {file.path}"
                    )
                found[name] = file
        return found


PICKLED = frozenset([".bin", ".pt", ".pth", ".ckpt", ".pkl"])
"""Endings of weights that are programs."""


def open_source(path: Path) -> Source:
    """Finds and opens the weights of a directory or file.

    Raises:
        ModelFormatError: Broken files, an index that does not fit them, or no weights that kbit opens.
        OSError: A file cannot be read.
    """
    if path.is_dir():
        return Source(path, tuple(TensorFile(file) for file in _weights_of(path)))
    if match := _SPLIT.fullmatch(path.name):
        stem, count = match[1], int(match[3])
        names = [f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
        return Source(path, tuple(TensorFile(path.with_name(name)) for name in names))
    if path.suffix in PICKLED:
        raise _pickled(path.name)
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] != b"GGUF" and start[8:] not in (b"{", b""):
        raise ModelFormatError(
            f"{path}: neither GGUF nor safetensors; it begins with {start[:8]!r}"
        )
    return Source(path, (TensorFile(path),))


def _pickled(what: str) -> ModelFormatError:
    return ModelFormatError(
        f"{what} is pickled code that kbit never opens; save it as safetensors with transformers: "
        "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory)"
    )


def _weights_of(directory: Path) -> list[Path]:
    index = read_json(directory / INDEX)
    if index is not None:
        return _shards(directory, index)
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    candidates = sorted((*directory.glob("*.safetensors"), *directory.glob("*.gguf")))
    if len(candidates) == 1:
        return candidates
    if candidates:
        some = ", ".join(path.name for path in candidates[:8])
        some += ", ..." if len(candidates) > 8 else ""
        raise ModelFormatError(
            f"{directory}: {len(candidates)} weight files ({some}) and no {INDEX}; pass the path of one"
        )
    pickles = sorted(path for path in directory.iterdir() if path.suffix in PICKLED)
    if pickles:
        raise _pickled(f"{directory}: only {pickles[0].name}, which")
    raise ModelFormatError(f"{directory}: no {WEIGHTS}, no {INDEX}, no *.gguf")


def _shards(directory: Path, index: Mapping[str, Any]) -> list[Path]:
    """The files that an index names; each must be in the directory itself."""
    value = index.get("weight_map")
    if not isinstance(value, dict) or not value:
        raise ModelFormatError(f"{INDEX}: weight_map must be an object of tensor names to files")
    table = cast("dict[str, Any]", value)
    names: dict[str, None] = {}
    for tensor, file in table.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ModelFormatError(
                f"{INDEX}: {tensor} is in {file!r:.80}, which is no file of the directory"
            )
        names[file] = None
    return [directory / name for name in names]


def check_index(source: Source) -> None:
    """Compares the index of a sharded directory with what the shards hold.

    Raises:
        ModelFormatError: They differ; the sentence names both sides.
    """
    index = read_json(source.directory / INDEX) if source.path.is_dir() else None
    if index is None:
        return
    held = {name: Path(file.path).name for name, file in source.tensors().items()}
    told: dict[str, str] = index["weight_map"]
    if wrong := [f"{name} in {file}" for name, file in told.items() if held.get(name) != file]:
        raise ModelFormatError(
            f"{INDEX} names {', '.join(wrong[:8])}, which the files do not hold; they hold "
            f"{len(held)} tensors, the index {len(told)}"
        )


def save(
    directory: Path,
    spec: ModelSpec,
    weights: Mapping[str, Weight],
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    source: Source,
) -> None:
    """Writes a model to a directory that loads without work: config, texts and weights.

    Nothing takes its place before everything was written, so a full disk leaves what was there.

    Raises:
        OSError: It cannot be written.
    """
    described = {name: value for name, value in config.items() if name != "quantization_config"}
    described["quantization_config"] = {"quant_method": "kbit", **metadata}
    strings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".saving-", dir=directory) as name:
            staging = Path(name)
            _write_json(staging / "config.json", described)
            for file, data in _texts(source):
                if isinstance(data, dict):
                    _write_json(staging / file, data)
                elif data.is_dir():
                    shutil.copytree(data, staging / file)
                else:
                    shutil.copyfile(data, staging / file)
            _core.save_checkpoint(directory / WEIGHTS, spec.to_json(), weights, strings)
            for path in [path for path in staging.rglob("*") if path.is_file()]:
                target = directory / path.relative_to(staging)
                target.parent.mkdir(exist_ok=True, parents=True)
                path.replace(target)
    except BaseException:
        if not existed:
            with suppress(OSError):  # the first error is the one to report
                directory.rmdir()
        raise


def _texts(source: Source) -> Iterator[tuple[str, Path | dict[str, Any]]]:
    """What belongs to a tokenizer: files to copy, or the keys of a GGUF file."""
    if source.is_gguf:
        metadata = source.files[0].metadata
        yield GGUF_TOKENIZER, {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
        return
    for name in _TEXT_FILES:
        if (path := source.directory / name).exists():
            yield name, path


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

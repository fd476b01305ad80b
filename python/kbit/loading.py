"""From a name to a model: find the files, read the config, map the tensors, quantise them one by one."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from kbit import _core, archs, checkpoint, dialects, hub
from kbit._core import Engine, MemoryBudgetError, ModelFormatError, Weight
from kbit.checkpoint import Source
from kbit.dialects import Stored
from kbit.model import Model
from kbit.progress import Progress
from kbit.quantizing import Bits, BitsPlan
from kbit.sampling import SamplingParams
from kbit.spec import ModelSpec
from kbit.text import Tokenizer
from kbit.text.hf_json import read_json

BUNDLED = Path(__file__).parent / "models" / "stories"
"""The model that `load()` takes when it is given no name."""

MAX_THREADS = 256
"""Of the engine, which is only built once all weights are read."""

T = TypeVar("T")

log = logging.getLogger("kbit")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `load` was asked for; enough to load the same model again in another process."""

    name: str
    bits: Bits = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    context: int | None = None
    kv: str | None = None
    activations: str = "int8"
    memory: int | str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    strict: bool = False


def load(
    name: str | os.PathLike[str] | None = None,
    *,
    bits: Bits = None,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    kv: str | None = None,
    activations: str = "int8",
    memory: int | str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    strict: bool = False,
) -> Model:
    """Loads a language model.

    Args:
        name: A Hugging Face directory, a `.safetensors` or `.gguf` file, a directory that `Model.save` wrote, or a
            hub id (`owner/name`, or `owner/name/file.gguf`); None: the small story teller that comes with kbit.
        bits: Width that matrices are quantised to while they are read, 2..8, the embedding and the output head one
            bit more, at least 4; or widths by pattern, such as `{"lm_head": 8, "*": 4}` (see `kbit.BitsPlan`);
            None: as stored.
        dtype: Of weights that are not quantised: `"f32"`, `"f16"`, `"bf16"`; None: as stored. `"f32"` gives the
            reference path, with an f32 cache.
        device: `"cpu"` or `"gpu"`; None: `KBIT_DEVICE`, then `"cpu"`.
        threads: None: `KBIT_NUM_THREADS`, then the cores this process may use, of which decoding leaves one in four or
            more to the application.
        context: Positions of a sequence; None: what the model was made for.
        kv: Type of the key-value cache: `"f32"`, `"f16"`, `"bf16"`, `"int8"`; None: `"f16"`, `"f32"` with f32 weights.
        activations: `"int8"`, or `"f32"` to run quantised weights on unquantised activations.
        memory: Bytes, or a text like `"8GB"` or `"512MiB"`, that weights and cache together may take.
        revision: Branch, tag or commit on the hub.
        cache_dir: Instead of the hub's usual cache.
        local_files_only: True never asks the network.
        strict: True refuses a config with keys that kbit does not know.

    Returns:
        The model, ready to generate.

    Raises:
        FileNotFoundError: No such file or directory.
        OSError: It cannot be read, or the hub cannot be reached.
        ModelFormatError: A file breaks its format; missing and left-over tensors are listed.
        UnsupportedModelError: Well-formed, but nothing kbit runs.
        MemoryBudgetError: It does not fit `memory`.
        ValueError: An argument is out of range.
    """
    if name is not None:
        name = os.fspath(name)
        if os.path.exists(name):
            name = os.path.abspath(name)
    return load_options(
        Options(
            name=str(BUNDLED) if name is None else name,
            bits=dict(bits) if isinstance(bits, Mapping) else bits,
            dtype=dtype,
            device=device,
            threads=threads,
            context=context,
            kv=kv,
            activations=activations,
            memory=memory,
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            strict=strict,
        )
    )


def load_options(options: Options) -> Model:
    """As `load`, from its arguments in one piece (a model pickles as these)."""
    plan = BitsPlan(options.bits, options.dtype)
    budget = parse_bytes(options.memory)
    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        raise ValueError(f"threads = {options.threads} is not in 1..{MAX_THREADS}")
    _core.isa()  # a KBIT_ISA that this processor lacks is no reason to read gigabytes first
    source = checkpoint.open_source(locate(options))
    description = describe(source, strict=options.strict)
    spec = description.spec
    if options.context is not None and not 1 <= options.context <= spec.max_position_embeddings:
        raise ValueError(
            f"context = {options.context} is not in 1..{spec.max_position_embeddings}, the positions of the model"
        )
    text = Beside(lambda: load_tokenizer(source))
    weights = (
        _read_saved(source, options)
        if source.is_saved
        else _read(source, description, plan, options, budget)
    )
    used = sum(weight.nbytes for weight in weights.values())
    if budget is not None and used >= budget:
        raise MemoryBudgetError(f"the weights take {used} bytes, memory allows {budget}")
    engine = Engine(
        spec.to_json(),
        weights,
        device=options.device or os.environ.get("KBIT_DEVICE") or "cpu",
        threads=options.threads or 0,
        kv=options.kv or ("f32" if options.dtype == "f32" else "f16"),
        cache_bytes=0 if budget is None else budget - used,
        activations=options.activations,
        context=options.context,
    )
    tokenizer = text.result()
    trim_memory()
    generation = generation_config(source)
    return Model(
        spec,
        weights,
        engine,
        tokenizer=tokenizer,
        config=description.config,
        defaults=defaults_from(generation),
        eos_token_ids=eos_ids(tokenizer, generation, description.config),
        source=source,
        options=options,
    )


# Finding


def locate(options: Options) -> Path:
    """The directory or file of a model; fetched from the hub if it is the id of one.

    Raises:
        FileNotFoundError: There is no such path, and it is no hub id.
        OSError: The hub has no such model or cannot be reached.
    """
    path = Path(options.name)
    if path.exists():
        return path
    at = {
        "revision": options.revision,
        "cache_dir": options.cache_dir,
        "local_files_only": options.local_files_only,
    }
    if hub.is_id(options.name):
        return hub.fetch(options.name, **at)  # pyright: ignore[reportArgumentType]
    if hub.is_file_id(options.name):
        return hub.fetch_file(options.name, **at)  # pyright: ignore[reportArgumentType]
    if path == BUNDLED:
        raise FileNotFoundError(
            f"{path}: this build of kbit comes without its model; see docs/bundled.md"
        )
    raise FileNotFoundError(
        f"{options.name}: no such file or directory, and not written like a hub id (owner/name)"
    )


@dataclass(frozen=True)
class Description:
    """What a model's files say it is."""

    spec: ModelSpec
    config: dict[str, Any]
    """`config.json`, or the key-values of a GGUF file without its vocabulary."""
    model_type: str
    """Of the architecture."""
    found: archs.Description | None
    """How to read it; None for what kbit saved."""


def describe(source: Source, *, strict: bool = False) -> Description:
    """Reads the config of a model.

    Raises:
        ModelFormatError: It is missing or wrong.
        UnsupportedModelError: kbit does not run it.
    """
    if source.is_gguf:
        metadata = source.files[0].metadata
        found = archs.describe_gguf(source.files)
        config = {k: v for k, v in metadata.items() if not k.startswith("tokenizer.")}
        return Description(found.spec, config, found.architecture.model_type, found)
    config = read_json(source.directory / "config.json")
    if source.is_saved:
        spec = ModelSpec.from_json(source.files[0].metadata.get("kbit.spec", ""))
        config = config or {}
        return Description(spec, config, str(config.get("model_type", "saved by kbit")), None)
    if config is None:
        raise ModelFormatError(
            f"{source.directory}: no config.json beside {Path(source.files[0].path).name}, which says what to compute"
        )
    checkpoint.check_index(source)
    found = archs.describe(config, strict=strict)
    if found.unread.unknown:
        log.info("config.json: keys that kbit does not know: %s", ", ".join(found.unread.unknown))
    return Description(found.spec, config, found.architecture.model_type, found)


# Weights


def _read(
    source: Source,
    description: Description,
    plan: BitsPlan,
    options: Options,
    budget: int | None,
) -> dict[str, Weight]:
    """All weights by canonical name, each quantised as soon as it is read."""
    assert description.found is not None
    stored = stored_weights(source, description)
    sources = description.found.sources(stored)
    tied = "head.weight" not in sources
    weights: dict[str, Weight] = {}
    total = sum(stored[one.tensor].nbytes for one in sources.values())
    storages = {
        canonical: plan.storage(
            canonical,
            [one.tensor],
            stored[one.tensor].shape,
            tied=tied and canonical == "embed.weight",
        )
        for canonical, one in sources.items()
    }
    plan.check_used(sources)  # before the work, not after it
    used = 0
    label = "loading" if options.bits is None else "quantising"
    with Progress(label, total) as progress:
        for canonical, one in sources.items():
            here = stored[one.tensor]
            bits, dtype = storages[canonical]
            weight = here.load(one.transforms, bits=bits, dtype=dtype, threads=options.threads or 0)
            weights[canonical] = weight
            used += weight.nbytes
            if budget is not None and used >= budget:
                raise MemoryBudgetError(
                    f"{len(weights)} of {len(sources)} weights take {used} bytes, memory allows {budget}"
                )
            progress.advance(here.nbytes)
    return weights


def stored_weights(source: Source, description: Description) -> dict[str, Stored]:
    """The weights of a source under the names its architecture knows, packed ones as one.

    Raises:
        ModelFormatError: A tensor in two files, or a wrong `quantization_config`.
        UnsupportedModelError: A way of packing that kbit does not read.
    """
    quantization: dict[str, Any] = {}
    if not source.is_gguf:
        beside = read_json(source.directory / "quantize_config.json")
        quantization = dialects.quantization_config(description.config, beside)
    return dialects.group(source.tensors(), quantization)


def _read_saved(source: Source, options: Options) -> dict[str, Weight]:
    """The weights of a directory that kbit saved: bytes as they are."""
    if options.bits is not None or options.dtype is not None:
        raise ValueError(
            f"{source.path} is a model that kbit saved and keeps its own widths; leave bits and dtype out, "
            "or quantise the original"
        )
    _, weights, _ = _core.open_checkpoint(source.files[0].path)
    return weights


# Text


class Beside(Generic[T]):
    """A call on a thread of its own: a tokenizer of 128,000 entries takes as long as a gigabyte of weights."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kbit-load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """What the call returned; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


def trim_memory() -> None:
    """Hands freed memory back to the system: a large tokenizer.json leaves some 90 MB of it, which glibc keeps."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def load_tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer of a model; None if it has none."""
    if source.is_gguf:
        metadata = source.files[0].metadata
        if metadata.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
            return None
        return Tokenizer.from_gguf(metadata)
    keys = read_json(source.directory / checkpoint.GGUF_TOKENIZER) if source.is_saved else None
    if keys is not None:
        return Tokenizer.from_gguf(keys)
    if not any(
        (source.directory / file).exists()
        for file in ("tokenizer.json", "tokenizer.model", "spiece.model")
    ):
        return None
    return Tokenizer.from_dir(source.directory)


def generation_config(source: Source) -> dict[str, Any]:
    """`generation_config.json`, or nothing."""
    if source.is_gguf:
        return {}
    return read_json(source.directory / "generation_config.json") or {}


def defaults_from(generation: Mapping[str, Any]) -> SamplingParams:
    """Sampling as the checkpoint wants it.

    Raises:
        ModelFormatError: `generation_config.json` has a value out of range.
    """
    try:
        return SamplingParams.from_generation_config(generation)
    except (TypeError, ValueError) as error:
        raise ModelFormatError(f"generation_config.json: {error}") from None


def eos_ids(
    tokenizer: Tokenizer | None, generation: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer knows them all; without one the configs tell."""
    if tokenizer is not None:
        return tuple(tokenizer.eos_ids)
    value: Any = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = cast("list[Any]", value) if isinstance(value, list) else [value]
    return tuple(i for i in ids if isinstance(i, int))


# Arguments

_UNITS = (
    {"": 1, "B": 1}
    | {f"{prefix}{b}": 1000 ** (i + 1) for i, prefix in enumerate("KMGT") for b in ("", "B")}
    | {f"{prefix}IB": 1024 ** (i + 1) for i, prefix in enumerate("KMGT")}
)


def parse_bytes(value: int | str | None) -> int | None:
    """A number of bytes: `8_000_000_000`, `"8GB"`, `"512MiB"`.

    >>> parse_bytes("1.5GiB")
    1610612736

    Raises:
        ValueError: Not a positive amount.
    """
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?B?)", str(value).strip().upper())
    if match is None or match[2] not in _UNITS or isinstance(value, bool):
        raise ValueError(
            f"memory = {value!r} is not an amount such as 8000000000, '8GB' or '512MiB'"
        )
    amount = int(float(match[1]) * _UNITS[match[2]])
    if amount < 1:
        raise ValueError(f"memory = {value!r} is no memory at all")
    return amount

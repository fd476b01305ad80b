"""A model as GGUF, every dequantised weight as it is; then read back, and compared with what was meant."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kbit import _core, archs
from kbit._core import ModelFormatError, TensorFile, UnsupportedModelError, Weight
from kbit.archs._gguf import KEYS, SCALING, SWITCHES, Gguf, gguf_names
from kbit.checkpoint import GGUF_TOKENIZER, Source
from kbit.model import Model
from kbit.names import Place, rope_halves, select_expert, targets
from kbit.spec import ModelSpec, RopeSpec
from kbit.text import gguf_export
from kbit.text.hf_json import read_json

Planned = tuple[str, Sequence[Weight | NDArray[np.float32]], bool, tuple[int, int] | None]


def convert(model: Model, target: str | os.PathLike[str]) -> dict[str, str]:
    """Writes a model as GGUF that llama.cpp loads.

    k-bit weights that came from GGUF keep their type, kbit's own become Q8_0 where that is exact, the rest F32.

    Returns:
        The GGUF type of every tensor.

    Raises:
        UnsupportedModelError: GGUF has no way to say what this model is; the sentence says what.
        OSError: The file cannot be written.
    """
    source = model.source
    architecture = _architecture(model, source)
    gguf = cast("Gguf", architecture.gguf)
    tensors = list(_tensors(model, gguf, gguf_names(gguf, architecture.names).names))
    metadata = _metadata(model, gguf) | _tokenizer(source, model.spec)
    for name, factors in _factors(model.spec).items():
        tensors.append((name, [np.array(factors, np.float32)], False, None))
    path = Path(target)
    types = _core.save_gguf(path, metadata, tensors)
    try:
        _check(model.spec, _read_back(path, gguf))
    except BaseException:
        path.unlink()
        raise
    return types


def _architecture(model: Model, source: Source) -> archs.Architecture:
    if source.is_gguf:
        return archs.describe_gguf(source.files).architecture
    found = archs.registry().get(str(model.config.get("model_type")))
    if found is None or found.gguf is None:
        raise UnsupportedModelError(
            f"convert: GGUF has no name for the architecture {model.config.get('model_type')!r:.80}"
        )
    return found


# Weights


def _tensors(model: Model, gguf: Gguf, names: Mapping[str, Any]) -> Iterator[Planned]:
    """Every weight under its GGUF name; experts stacked, and joined what is fused there under no other name."""
    left = dict(model.weights)
    fused = {p: targets(value) for p, value in gguf.names.items() if len(targets(value)) > 1}
    for pattern, parts in fused.items():
        for i, suffix in itertools.product(range(len(model.spec.layers)), (".weight", ".bias")):
            found = [part.name.replace("{i}", str(i)) + suffix for part in parts]
            if left.keys() >= set(found):
                name = pattern.replace("{i}", str(i)) + suffix
                yield name, [left.pop(each) for each in found], False, None
    for pattern, value in names.items():
        steps = [target.steps for target in targets(value)]
        if len(steps) != 1 or any(step not in (rope_halves, select_expert) for step in steps[0]):
            continue  # Fused or moved in a way that has another name as well.
        to = targets(value)[0]
        stacked = select_expert in steps[0]
        for suffix in (".weight", ".bias") if to.is_module else ("",):
            places: dict[int, list[str]] = {}
            shape = re.compile(
                re.escape(to.name + suffix)
                .replace(r"\{i\}", r"(?P<i>\d+)")
                .replace(r"\{e\}", r"(?P<e>\d+)")
            )
            for name in list(left):
                if match := shape.fullmatch(name):
                    places.setdefault(int(match.groupdict().get("i") or 0), []).append(name)
            for i, found in places.items():
                if not stacked and len(found) > 1:
                    continue  # Experts one by one, as files no longer have them.
                found.sort(key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
                rope = None
                if rope_halves in steps[0]:
                    ((_, heads, rotated),) = rope_halves(Place(model.spec, found[0], 0))
                    rope = (heads, rotated)
                ending = suffix if suffix else ""
                name = pattern.replace("{i}", str(i)) + (ending if _is_module(pattern) else "")
                yield name, [left.pop(each) for each in found], stacked, rope
    if left:
        some = ", ".join(list(left)[:8])
        raise UnsupportedModelError(f"convert: GGUF of {gguf.name} has no name for {some}")


def _is_module(pattern: str) -> bool:
    return not pattern.endswith((".weight", ".bias"))


# Hyper-parameters


def _metadata(model: Model, gguf: Gguf) -> dict[str, Any]:
    """What the spec says, by GGUF's keys."""
    spec = model.spec
    values: dict[str, Any] = {
        name: value for name, value in asdict(spec).items() if name in KEYS and value is not None
    }
    values["num_hidden_layers"] = len(spec.layers)
    if spec.moe:
        values |= {name: value for name, value in asdict(spec.moe).items() if name in KEYS}
    asked = {name: keys[0] for name, keys in KEYS.items() if name in SWITCHES} | dict(gguf.keys)
    switches = {key: model.config[name] for name, key in asked.items() if name in model.config}
    windows = {layer.sliding_window for layer in spec.layers} - {None}
    if windows:
        values["sliding_window"] = windows.pop()
    metadata: dict[str, Any] = {
        "general.architecture": gguf.name,
        "general.name": model.name,
        "general.quantization_version": 2,
    }
    prefix = f"{gguf.name}."
    if spec.ropes:
        rope = spec.ropes[0]
        values |= {"rope_theta": rope.rope_theta, "rotary_dim": rope.rotary_dim}
        metadata |= {prefix + key: value for key, value in _scaling(rope).items()}
    for name, value in values.items():
        keys = KEYS[name]
        # The first of the two epsilons is that of an RMS norm.
        key = keys[-1] if name == "norm_eps" and spec.norm == "layer" else keys[0]
        metadata[prefix + key] = value
    metadata |= {prefix + key: value for key, value in switches.items()}
    metadata[f"{prefix}attention.value_length"] = spec.head_dim
    metadata[f"{prefix}vocab_size"] = spec.vocab_size
    return metadata


def _scaling(rope: RopeSpec) -> dict[str, Any]:
    """How positions are stretched, where GGUF has words for it."""
    if rope.rope_type in ("default", "llama3", "longrope"):
        found = {"rope.scaling.original_context_length": rope.original_max_position_embeddings}
        return {k: v for k, v in found.items() if v is not None and rope.rope_type == "longrope"}
    if rope.rope_type not in ("linear", "yarn"):
        raise UnsupportedModelError(f"convert: GGUF has no {rope.rope_type} rope scaling")
    values = {key: getattr(rope, name) for name, key in SCALING.items()}
    kept = {key: value for key, value in values.items() if value is not None}
    if rope.rope_type == "yarn":
        kept.pop("rope.scaling.attn_factor", None)
    return {"rope.scaling.type": rope.rope_type, **kept}


def _factors(spec: ModelSpec) -> dict[str, Sequence[float]]:
    """Tables by which the angle of each pair is divided."""
    rope = spec.ropes[0] if spec.ropes else None
    if rope is None or rope.rope_type not in ("llama3", "longrope"):
        return {}
    if rope.rope_type == "longrope":
        short, long = rope.short_factor or (), rope.long_factor or ()
        if short == long:
            return {"rope_freqs.weight": short}
        return {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    context = rope.original_max_position_embeddings
    if not (context and rope.factor and rope.low_freq_factor and rope.high_freq_factor):
        raise ModelFormatError("convert: llama3 rope scaling lacks a factor")
    factors: list[float] = []
    for j in range(0, rope.rotary_dim, 2):
        wavelength = 2 * math.pi * rope.rope_theta ** (j / rope.rotary_dim)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        share = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - share) / rope.factor + share))
    return {"rope_freqs.weight": factors}


# Tokenizer


def _tokenizer(source: Source, spec: ModelSpec) -> dict[str, Any]:
    """`tokenizer.*`: copied from a GGUF file, or made from the files of a directory."""
    beside = source.directory / GGUF_TOKENIZER
    keys = source.files[0].metadata if source.is_gguf else read_json(beside)
    if keys is not None:
        found = {k: v for k, v in keys.items() if k.startswith("tokenizer.")}
        charsmap = "tokenizer.ggml.precompiled_charsmap"
        if charsmap in found:
            found[charsmap] = bytes(b % 256 for b in found[charsmap])
        return found
    return gguf_export.metadata(source.directory, spec.vocab_size)


# The proof


def _read_back(path: Path, gguf: Gguf) -> ModelSpec:
    try:
        return archs.describe_gguf([TensorFile(path)]).spec
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"convert: GGUF's {gguf.name} cannot say this ({error})"
        ) from None


def _check(meant: ModelSpec, found: ModelSpec) -> None:
    """Compares what the file says with the model.

    Raises:
        UnsupportedModelError: It says something else.
    """
    told, read = asdict(meant), asdict(found)
    for name, value in told.items():
        if name != "ropes" and not _same(value, read[name]):
            raise UnsupportedModelError(
                f"convert: in GGUF {name} would be {read[name]!r:.80}, the model has {value!r:.80}"
            )
    for rope, other in zip(meant.ropes, found.ropes, strict=True):
        same = rope.rope_theta == other.rope_theta and rope.rotary_dim == other.rotary_dim
        tables = {"llama3": "longrope"}.get(rope.rope_type, rope.rope_type)
        if not same or tables != other.rope_type:
            raise UnsupportedModelError(f"convert: in GGUF the rope would be {other}, not {rope}")


def _same(a: Any, b: Any) -> bool:
    """Equal, numbers to the precision of f32."""
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=2**-23)
    return a == b

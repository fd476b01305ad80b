"""Checkpoints that others quantised: which tensors of a file are the parts of one weight.

A dialect is recognised by its tensors' names; `quantization_config` adds the numbers that the tensors do not tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from kbit import _core
from kbit._core import ModelFormatError, TensorFile, UnsupportedModelError, Weight

Part = tuple[TensorFile, str]


@dataclass(frozen=True)
class Dialect:
    """Names of one way to pack weights."""

    name: str
    """For `_core.load_packed`."""
    parts: Mapping[str, str]
    """Suffix behind a module's name to part; the first one marks a weight of this dialect."""
    logical: str = ".weight"
    """Suffix under which the architecture knows the weight."""
    unread: tuple[str, ...] = ()
    """Suffixes of tensors that say nothing new."""


_GPTQ = {".qweight": "qweight", ".qzeros": "qzeros", ".scales": "scales", ".g_idx": "g_idx"}
DIALECTS = (
    Dialect("gptq", _GPTQ),
    Dialect("gptq_v2", _GPTQ),
    Dialect("awq", {suffix: part for suffix, part in _GPTQ.items() if part != "g_idx"}),
    Dialect(
        "compressed",
        {
            ".weight_packed": "weight_packed",
            ".weight_scale": "weight_scale",
            ".weight_zero_point": "weight_zero_point",
            ".weight_g_idx": "weight_g_idx",
        },
        unread=(".weight_shape",),
    ),
    Dialect(
        "bitsandbytes",
        {
            ".weight.absmax": "absmax",
            ".weight": "weight",
            ".weight.quant_map": "quant_map",
            ".weight.quant_state.bitsandbytes__nf4": "quant_state",
            ".weight.quant_state.bitsandbytes__fp4": "quant_state",
            ".weight.nested_absmax": "nested_absmax",
            ".weight.nested_quant_map": "nested_quant_map",
        },
    ),
    Dialect(
        "fp8",
        {".weight_scale_inv": "weight_scale", ".weight": "weight"},
        unread=(".input_scale", ".activation_scale"),
    ),
    Dialect(
        "fp8",
        {".weight_scale": "weight_scale", ".weight": "weight"},
        unread=(".input_scale",),
    ),
    Dialect("mxfp4", {"_blocks": "blocks", "_scales": "scales"}, logical="_blocks"),
)
METHODS: dict[str, tuple[str, ...]] = {
    "gptq": ("gptq", "gptq_v2"),
    "awq": ("awq",),
    "compressed-tensors": ("compressed", "fp8"),
    "bitsandbytes": ("bitsandbytes",),
    "fp8": ("fp8",),
    "fbgemm_fp8": ("fp8",),
    "mxfp4": ("mxfp4",),
}
"""`quant_method` to the dialects it may use."""


@dataclass(frozen=True)
class Stored:
    """A weight as it lies in a checkpoint."""

    parts: Mapping[str, Part]
    """By the part they play; a plain tensor is the only one, under its name."""
    dialect: str | None = None
    """None for a plain tensor."""
    bits: int | None = None
    block: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(file.nbytes(name) for file, name in self.parts.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first part: that of a plain tensor, and at least the rank of a packed one."""
        file, name = next(iter(self.parts.values()))
        return file.shape(name)

    def load(
        self,
        transforms: tuple[tuple[Any, ...], ...],
        *,
        bits: int | None,
        dtype: str | None,
        threads: int,
    ) -> Weight:
        """The weight, quantised to `bits` where they are given; only this one is ever unquantised.

        Raises:
            ModelFormatError: Its parts do not fit each other.
            UnsupportedModelError: What the engine's layout cannot hold.
            ValueError: A dtype for packed weights.
        """
        if self.dialect is None:
            return _core.load_weight(
                list(self.parts.values()),
                transforms=transforms,
                bits=bits,
                dtype=dtype,
                threads=threads,
            )
        if dtype is not None:
            raise ValueError(
                f"dtype = {dtype!r}: {self.dialect} weights keep their bits; activations='f32' computes with "
                "their exact values"
            )
        weight = _core.load_packed(
            self.dialect, self.parts, transforms=transforms, bits=self.bits, block=self.block
        )
        return (
            weight if bits is None else _core.quantize(weight.dequantize(), bits, threads=threads)
        )


def group(tensors: Mapping[str, TensorFile], quantization: Mapping[str, Any]) -> dict[str, Stored]:
    """The weights of a checkpoint under the names its architecture knows.

    Args:
        tensors: The file of every tensor.
        quantization: `quantization_config`, empty where there is none.

    Raises:
        ModelFormatError: The config lacks a number or contradicts itself.
        UnsupportedModelError: A way of packing that kbit does not read.
    """
    method = quantization.get("quant_method")
    if method is not None and method not in METHODS:
        raise UnsupportedModelError(
            f"quantization_config: quant_method is {method!r:.80}, kbit reads {', '.join(METHODS)}"
        )
    allowed = METHODS[method] if method else ("mxfp4",)
    _check_layout(str(method), quantization)
    bits = _bits(str(method), quantization)
    block = _block(quantization)
    if method == "gptq":
        allowed = ("gptq_v2",) if quantization.get("checkpoint_format") == "gptq_v2" else ("gptq",)
    dialects = [dialect for dialect in DIALECTS if dialect.name in allowed]
    weights: dict[str, Stored] = {}
    taken: set[str] = set()
    for name in tensors:
        for dialect in dialects:
            mark = next(iter(dialect.parts))
            if not name.endswith(mark):
                continue
            stem = name.removesuffix(mark)
            found = {s: stem + s for s in dialect.parts if stem + s in tensors}
            parts = {dialect.parts[s]: (tensors[n], n) for s, n in found.items()}
            if dialect.name in ("fp8", "mxfp4") and len(parts) < 2:
                continue
            weights[stem + dialect.logical] = Stored(parts, dialect.name, bits, block)
            taken.update(found.values(), (stem + suffix for suffix in dialect.unread))
    plain = {
        name: Stored({name: (file, name)}) for name, file in tensors.items() if name not in taken
    }
    if clash := sorted(plain.keys() & weights.keys()):
        raise ModelFormatError(f"checkpoint has {clash[0]} plain and packed")
    if "fp8" in allowed:
        for name, file in tensors.items():
            if name in plain and file.dtype(name).startswith("F8"):
                raise ModelFormatError(
                    f"checkpoint: {name} is {file.dtype(name)} and has no {name}_scale_inv or {name}_scale"
                )
    # gpt-oss: its name map lists the scales itself, so they stay visible.
    scales = {
        name: stored
        for name, stored in ((n, Stored({n: (f, n)})) for n, f in tensors.items())
        if name in taken and name.endswith("_scales")
    }
    return weights | plain | scales


def quantization_config(
    config: Mapping[str, Any], beside: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a checkpoint says about its packing, from `config.json` or the older `quantize_config.json` beside it.

    Raises:
        ModelFormatError: Not an object.
    """
    value = config.get("quantization_config") or config.get("compression_config")
    if value is None and beside is not None:
        value = {"quant_method": "gptq", **beside}
    if value is not None and not isinstance(value, dict):
        raise ModelFormatError(f"config: quantization_config must be an object, is {value!r:.80}")
    return cast("dict[str, Any]", value or {})


def _check_layout(method: str, quantization: Mapping[str, Any]) -> None:
    """Refuses variants whose tensors have the same names and another meaning."""
    checks: dict[str, tuple[str, tuple[Any, ...]]] = {
        "gptq": ("checkpoint_format", (None, "gptq", "gptq_v2")),
        "awq": ("version", (None, "gemm", "GEMM")),
        "bitsandbytes": ("load_in_8bit", (None, False)),
        "compressed-tensors": (
            "format",
            (None, "pack-quantized", "float-quantized", "naive-quantized"),
        ),
    }
    if method in checks:
        key, values = checks[method]
        if quantization.get(key) not in values:
            known = ", ".join(map(repr, values[1:]))
            raise UnsupportedModelError(
                f"quantization_config: {method} with {key} = {quantization.get(key)!r:.80}; kbit reads {known}"
            )


def _bits(method: str, quantization: Mapping[str, Any]) -> int | None:
    """Width of a code, where the tensors do not tell."""
    found: set[Any] = set()
    if method == "gptq":
        found = {quantization.get("bits")}
        if quantization.get("dynamic"):
            raise UnsupportedModelError("quantization_config: gptq with widths by module (dynamic)")
    elif method == "compressed-tensors":
        groups = quantization.get("config_groups")
        values = cast("dict[str, Any]", groups).values() if isinstance(groups, dict) else ()
        for each in values:
            weights = each.get("weights") if isinstance(each, dict) else None  # pyright: ignore
            found.add(weights.get("num_bits") if isinstance(weights, dict) else None)  # pyright: ignore
        if len(found) > 1:
            raise UnsupportedModelError(
                f"quantization_config: config_groups of {', '.join(sorted(map(str, found)))} bits; kbit reads one width"
            )
    else:
        return None
    width = next(iter(found), None)
    if not isinstance(width, int) or not 1 <= width <= 16:
        raise ModelFormatError(
            f"quantization_config: {method} needs the bits of a code, has {width!r:.80}"
        )
    return width


def _block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, inputs) under one scale of block-wise fp8."""
    value = quantization.get("weight_block_size")
    if value is None:
        return None
    sizes = cast("list[Any]", value) if isinstance(value, list) else []
    if len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes):
        return (sizes[0], sizes[1])
    raise ModelFormatError(
        f"quantization_config: weight_block_size must be two whole numbers, is {value!r:.80}"
    )

"""Which weight gets how many bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kbit import _core
from kbit._core import Weight

MIN_BITS, MAX_BITS = 2, 8
DTYPES = ("f32", "f16", "bf16")

Bits = int | Mapping[str, int | str | None] | None
"""What `bits` may be: a width, a width or dtype by pattern, or None for what is stored."""


class Storage(NamedTuple):
    """How one weight is held: in k bits, or dense in a dtype; both None: as stored."""

    bits: int | None = None
    dtype: str | None = None


def head_bits(bits: int) -> int:
    """Width of the embedding and the output head of a model in `bits` bits: one more, at least 4.

    Of all places for one more bit, theirs buys most (docs/formats.md).

    >>> [head_bits(k) for k in range(2, 9)]
    [4, 4, 5, 6, 7, 8, 8]
    """
    return min(max(bits + 1, 4), MAX_BITS)


class BitsPlan:
    """The answer to `load(bits=...)` for each weight.

    A number k quantises every matrix to k bits, the embedding and the output head to one more (`head_bits`). A
    mapping gives widths (2..8), dtypes (`"f32"`, `"f16"`, `"bf16"`) or None (as stored) by pattern: a run of whole
    dot-separated parts of a weight's canonical or checkpoint name, with `*` and `?` as wildcards (`"lm_head"`,
    `"mlp.down"`, `"layers.0"`, `"layers.*.attn.v"`). Of several patterns that fit, the one with the most characters
    besides wildcards wins, whatever the order; `"*"` alone stands for the plain k, with its exception for the head.
    Vectors (norms, biases), routers and learned positions stay f32 unless a pattern other than `"*"` names them.

    >>> plan = BitsPlan({"lm_head": 8, "*": 4})
    >>> plan.storage("head.weight", ["lm_head.weight"], (512, 64))
    Storage(bits=8, dtype=None)
    >>> plan.storage("embed.weight", ["model.embed_tokens.weight"], (512, 64))
    Storage(bits=5, dtype=None)

    Raises:
        ValueError: A width or dtype that there is not.
        TypeError: `bits` or a value of it has the wrong type.
    """

    def __init__(self, bits: Bits = None, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
        if isinstance(bits, Mapping):
            rules = dict(bits)
        else:
            if bits is not None and dtype is not None:
                raise ValueError(
                    f"bits = {bits!r} and dtype = {dtype!r} exclude each other; "
                    f"bits={{pattern: {bits!r}}} with dtype says which weights are quantised"
                )
            rules = {} if bits is None else {"*": bits}
        self._base = Storage(dtype=dtype)
        self._rules: dict[str, Storage] = {}
        self._used: set[str] = set()
        for pattern, value in rules.items():
            if not isinstance(pattern, str) or not pattern:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"bits has the pattern {pattern!r}, which is not a name")
            if pattern == "*":
                self._base = _storage(pattern, value)
            else:
                self._rules[pattern] = _storage(pattern, value)

    def storage(
        self, canonical: str, sources: Sequence[str], shape: tuple[int, ...], *, tied: bool = False
    ) -> Storage:
        """How to hold a weight.

        Args:
            canonical: Its name in docs/adding.md.
            sources: Its names in the checkpoint.
            shape: Of the stored tensor.
            tied: An embedding that is the output head too, which then answers to the head's names as well.
        """
        names = [canonical, *sources]
        if tied:
            names += ["head.weight", "lm_head.weight", "output.weight"]
        fitting = [
            pattern
            for pattern in self._rules
            if any(fnmatchcase(f".{name}.", f"*.{pattern}.*") for name in names)
        ]
        if fitting:
            self._used.update(fitting)
            return self._rules[max(fitting, key=_literal_characters)]
        if len(shape) < 2 or canonical.endswith(_KEPT_DENSE):
            return Storage(dtype="f32")
        bits, dtype = self._base
        if bits is not None and canonical in ("embed.weight", "head.weight"):
            bits = head_bits(bits)
        return Storage(bits, dtype)

    def check_used(self, names: Collection[str]) -> None:
        """Raises ValueError for patterns that fitted no weight of `names`."""
        if unused := [pattern for pattern in self._rules if pattern not in self._used]:
            some = ", ".join(sorted(names)[:8])
            raise ValueError(
                f"bits: no weight fits {', '.join(map(repr, unused))}; "
                f"the {len(names)} weights are named like {some}"
            )


_KEPT_DENSE = (".router.weight", ".positions.weight", ".sinks", ".bias", "norm.weight")


def _literal_characters(pattern: str) -> int:
    return sum(c not in "*?" for c in pattern)


def _storage(pattern: str, value: Any) -> Storage:
    if value is None or (isinstance(value, str) and value in DTYPES):
        return Storage(dtype=value)
    if isinstance(value, str):
        raise ValueError(f"bits[{pattern!r}] = {value!r} is not one of {', '.join(DTYPES)}")
    return Storage(bits=check_bits(value))


def check_bits(bits: Any) -> int:
    """`bits` as an int.

    Raises:
        ValueError: Not in 2..8.
        TypeError: Not an int.
    """
    if isinstance(bits, bool) or not hasattr(bits, "__index__"):
        raise TypeError(f"bits = {bits!r} is not an int, a mapping of patterns or None")
    if not MIN_BITS <= int(bits) <= MAX_BITS:
        raise ValueError(f"bits = {int(bits)} is not in {MIN_BITS}..{MAX_BITS}")
    return int(bits)


def quantize(
    array: ArrayLike,
    bits: int,
    *,
    format: str = "learned",
    block: int | None = None,
    importance: ArrayLike | None = None,
    threads: int = 0,
) -> Weight:
    """Quantise a matrix to `bits` bits per weight.

    Args:
        array: (out_features, in_features), converted to float32.
        bits: Width of a code, 2..8.
        format: Codebook: `"int"`, `"float"`, `"quantile"`, `"nf"` or `"learned"`.
        block: Inputs under one sub-scale, 16, 32 or 64; None takes what serves `bits` best.
        importance: (in_features,) weights of the squared error.
        threads: 0 takes the default of `kbit doctor`.

    Returns:
        The matrix as the engine holds it, with `dequantize()`, `matmul(x)`, `nbytes` and `bits_per_weight`.

    Raises:
        ValueError: An argument is out of range, or a value is not finite.
    """
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    matrix = np.ascontiguousarray(array, dtype=np.float32)
    return _core.quantize(
        matrix, check_bits(bits), format=format, block=block, importance=weights, threads=threads
    )

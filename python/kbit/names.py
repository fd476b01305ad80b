"""From the tensor names of a checkpoint to canonical names (docs/adding.md), with transforms.

A name map is data: checkpoint patterns to canonical patterns, `{i}` a layer and `{e}` an expert. A
pattern names a tensor, or a module whose `.weight` and `.bias` are carried over. Where a tensor
needs more than a new name, the value is a `To` with steps, or several where it holds several (a
fused qkv).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from kbit._core import ModelFormatError
from kbit.spec import ModelSpec

Transform = tuple[Any, ...]
"""One transform of `kbit._core.load_weight`."""


@dataclass(frozen=True)
class Place:
    """What a step may depend on."""

    spec: ModelSpec
    """The model."""
    name: str
    """Canonical name of the result."""
    expert: int
    """Expert of the result, 0 elsewhere."""

    @property
    def is_bias(self) -> bool:
        """Whether the result is a bias: one row where a weight has a matrix."""
        return self.name.endswith(".bias")

    @property
    def heads(self) -> int:
        """Heads of the projection named."""
        keys = (".attn.k.", ".attn.v.")
        spec = self.spec
        return (
            spec.num_key_value_heads
            if any(key in self.name for key in keys)
            else spec.num_attention_heads
        )


Step = Callable[[Place], tuple[Transform, ...]]
"""Transforms of one tensor, in order."""


@dataclass(frozen=True)
class To:
    """A canonical pattern and the steps that lead to it."""

    name: str
    steps: tuple[Step, ...] = ()

    @property
    def is_module(self) -> bool:
        """Whether `.weight` and `.bias` are carried over, because the name itself has none."""
        return not self.name.endswith((".weight", ".bias", ".sinks"))


def to(name: str, *steps: Step) -> To:
    """`name` after `steps`."""
    return To(name, steps)


def transpose(place: Place) -> tuple[Transform, ...]:
    """(in, out) to (out, in): GPT-2's Conv1D."""
    return () if place.is_bias else (("transpose",),)


def add_one(place: Place) -> tuple[Transform, ...]:
    """1 + w: Gemma's norms."""
    return (("add", 1.0),)


def rope_halves(place: Place) -> tuple[Transform, ...]:
    """Rotated pairs that lie side by side (GPT-J, llama.cpp's llama) to halves."""
    dim = place.spec.ropes[0].rotary_dim if place.spec.ropes else place.spec.head_dim
    return (("permute_rope", place.heads, dim),)


def select_expert(place: Place) -> tuple[Transform, ...]:
    """One expert of a tensor that stacks all."""
    return (("select", place.expert),)


def gate_of_pairs(place: Place) -> tuple[Transform, ...]:
    """The even rows of a matrix that interleaves gate and up (gpt-oss)."""
    return _of_pairs(place, 0)


def up_of_pairs(place: Place) -> tuple[Transform, ...]:
    """The odd rows of a matrix that interleaves gate and up (gpt-oss)."""
    return _of_pairs(place, 1)


def _of_pairs(place: Place, part: int) -> tuple[Transform, ...]:
    width = _expert_width(place.spec)
    as_vector = (("reshape", 2 * width),) if place.is_bias else ()
    rows = ("rows", part * width, (part + 1) * width)
    return (*as_vector, ("permute_rope", 1, 2 * width), rows)


def fused_qkv(prefix: str, *first: Step) -> tuple[To, ...]:
    """q, k and v rows below each other, after the steps `first`."""

    def rows(place: Place, part: int) -> tuple[Transform, ...]:
        q = place.spec.num_attention_heads * place.spec.head_dim
        kv = place.spec.num_key_value_heads * place.spec.head_dim
        ends = (0, q, q + kv, q + 2 * kv)
        return (("rows", ends[part], ends[part + 1]),)

    names = [f"{prefix}.{x}" for x in "qkv"]
    return tuple(To(name, (*first, partial(rows, part=i))) for i, name in enumerate(names))


def fused_heads(prefix: str) -> tuple[To, ...]:
    """q, k and v rows below each other within every head (GPT-NeoX, BLOOM)."""

    def rows(place: Place, part: int) -> tuple[Transform, ...]:
        heads, dim = place.spec.num_attention_heads, place.spec.head_dim
        columns = 1 if place.is_bias else place.spec.hidden_size
        result = (heads * dim,) if place.is_bias else (heads * dim, columns)
        by_head = ("reshape", heads, 3, dim, columns)
        return (by_head, ("select", part, 1), ("reshape", *result))

    return tuple(To(f"{prefix}.{x}", (partial(rows, part=i),)) for i, x in enumerate("qkv"))


def fused_gate_up(prefix: str) -> tuple[To, ...]:
    """Gate rows above up rows."""

    def rows(place: Place, part: int) -> tuple[Transform, ...]:
        width = place.spec.intermediate_size
        return (("rows", part * width, (part + 1) * width),)

    names = [f"{prefix}.{x}" for x in ("gate", "up")]
    return tuple(To(name, (partial(rows, part=i),)) for i, name in enumerate(names))


def experts_gate_up(prefix: str) -> tuple[To, ...]:
    """All experts stacked, each with gate rows above up rows."""

    def rows(place: Place, part: int) -> tuple[Transform, ...]:
        width = _expert_width(place.spec)
        return (("select", place.expert), ("rows", part * width, (part + 1) * width))

    names = [f"{prefix}.{x}.weight" for x in ("gate", "up")]
    return tuple(To(name, (partial(rows, part=i),)) for i, name in enumerate(names))


def steps_on(names: Mapping[str, Target], word: str, *steps: Step) -> dict[str, Target]:
    """`names` with steps after those of every target that has `word` in its name."""
    return {
        pattern: tuple(
            replace(t, steps=(*t.steps, *steps)) if word in t.name else t for t in targets(value)
        )
        for pattern, value in names.items()
    }


def _expert_width(spec: ModelSpec) -> int:
    return spec.moe.moe_intermediate_size if spec.moe else spec.intermediate_size


Target = str | To | tuple[To, ...]


@dataclass(frozen=True)
class NameMap:
    """How an architecture's checkpoints name their tensors."""

    names: Mapping[str, Target]
    """Checkpoint pattern (without prefix) to canonical pattern."""
    prefixes: tuple[str, ...] = ()
    """Prefixes that a name may have or lack."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that nothing is computed from (tables, masks)."""
    optional: tuple[str, ...] = ()
    """Canonical patterns of weights that a model may lack; biases always may."""


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor comes from."""

    tensor: str
    """Name in the checkpoint."""
    transforms: tuple[Transform, ...]
    """For `kbit._core.load_weight`."""


def resolve(
    names: NameMap, spec: ModelSpec, tensors: Iterable[str], *, tied: bool | None = None
) -> dict[str, Source]:
    """The source of every canonical tensor of a checkpoint.

    Args:
        names: Name map of its architecture.
        spec: Its model.
        tensors: Names of all its tensors.
        tied: Whether the head is the embedding; None: if there is no tensor for it.

    Raises:
        ModelFormatError: A tensor has no place, or a place no tensor; the sentence names both.
    """
    table = _Table(names)
    sources: dict[str, Source] = {}
    left_over: list[str] = []
    for tensor in tensors:
        matches = table.find(tensor)
        if matches is None:
            continue
        found = False
        for target, values in matches:
            for name, expert in _expand(target.name, values, spec):
                found = True
                if tied and name.startswith("head."):
                    continue
                if name in sources:
                    other = sources[name].tensor
                    raise ModelFormatError(f"checkpoint has {other} and {tensor}, both for {name}")
                place = Place(spec, name, expert)
                transforms = tuple(t for step in target.steps for t in step(place))
                sources[name] = Source(tensor, transforms)
        if not found:
            left_over.append(tensor)
    missing = list(islice(_missing(names, spec, sources, tied), 21))
    if left_over or missing:
        sides: list[str] = []
        if left_over:
            sides.append(
                f"it has {_list(sorted(left_over))}, which this architecture does not have"
            )
        if missing:
            sides.append(f"it lacks {_list(missing)}")
        raise ModelFormatError(f"the checkpoint's tensors do not fit the model: {'; '.join(sides)}")
    return sources


def _list(names: list[str]) -> str:
    rest = len(names) - 20
    more = f" and {'more' if rest == 1 else f'{rest} more'}"
    return ", ".join(names[:20]) + (more if rest > 0 else "")


def _missing(
    names: NameMap, spec: ModelSpec, sources: Mapping[str, Source], tied: bool | None
) -> Iterator[str]:
    """Canonical tensors without a source, and how the checkpoint would have named them."""
    seen: set[str] = set()
    for pattern, value in names.names.items():
        for target in targets(value):
            if target.name in seen:
                continue
            seen.add(target.name)
            for suffix in (".weight", ".bias") if target.is_module else ("",):
                canonical = target.name + suffix
                needed = not canonical.endswith(".bias") and not _is_optional(
                    target.name, names, tied
                )
                places = _expand(canonical, {}, spec)
                # Optional things are all there or all absent: a bias in one layer asks for all.
                if not needed and not any(
                    name in sources for name, _ in _expand(canonical, {}, spec)
                ):
                    continue
                for name, _ in places:
                    if name not in sources:
                        yield f"{name} ({pattern}{suffix})"


def _is_optional(name: str, names: NameMap, tied: bool | None) -> bool:
    return name in names.optional or (name.startswith("head") and tied is not False)


def targets(value: Target) -> tuple[To, ...]:
    """A map's value as what it stands for."""
    if isinstance(value, str):
        return (To(value),)
    return (value,) if isinstance(value, To) else value


def _expand(name: str, values: Mapping[str, int], spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """Canonical names with their expert, for all layers and experts that `values` leaves open."""
    is_mlp, is_expert = ".mlp." in name, ".mlp.experts." in name or ".mlp.router" in name
    count = len(spec.layers) if "{i}" in name else 1
    experts = spec.moe.num_experts if spec.moe and "{e}" in name else 1
    for i in _range(values.get("i"), count):
        if is_mlp and "norm" not in name and "{i}" in name and spec.layers[i].experts != is_expert:
            continue
        for e in _range(values.get("e"), experts):
            yield name.replace("{i}", str(i)).replace("{e}", str(e)), e


def _range(value: int | None, count: int) -> Iterable[int]:
    if value is None:
        return range(count)
    return (value,) if value < count else ()


class _Table:
    """Patterns by their shape, so that finding a name takes one step."""

    _NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])", re.ASCII)
    _HOLE = re.compile(r"\{[a-z]\}")

    def __init__(self, names: NameMap) -> None:
        self._prefixes = names.prefixes
        self._names = {
            self._shape(pattern): (pattern, value) for pattern, value in names.names.items()
        }
        self._ignored = {self._shape(pattern) for pattern in names.ignored}

    def find(self, tensor: str) -> list[tuple[To, dict[str, int]]] | None:
        """Targets of a tensor with its indices; empty if it has none, None if it is ignored."""
        for name in (
            *(tensor.removeprefix(p) for p in self._prefixes if tensor.startswith(p)),
            tensor,
        ):
            shape = self._NUMBER.sub("#", name)
            if shape in self._ignored:
                return None
            stem, _, suffix = shape.rpartition(".")
            keys = [(shape, "", False)]
            if suffix in ("weight", "bias"):
                keys.append((stem, f".{suffix}", True))
            for key, ending, is_module in keys:
                pattern, value = self._names.get(key, ("", ""))
                found = [target for target in targets(value) if target.is_module is is_module]
                if pattern and found:
                    holes = [hole[1] for hole in self._HOLE.findall(pattern)]
                    numbers = [int(number) for number in self._NUMBER.findall(name)]
                    values = dict(zip(holes, numbers, strict=True))
                    return [(To(target.name + ending, target.steps), values) for target in found]
        return []

    def _shape(self, pattern: str) -> str:
        return self._HOLE.sub("#", pattern)

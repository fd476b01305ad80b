"""A checkpoint's hyper-parameters under one spelling, every value checked before it is used.

`config.json` has had several spellings: `n_embd` and `hidden_size`, `rope_scaling` and
`rope_parameters`, `torch_dtype` and `dtype`. `Config` answers by the newest one. What it is asked
for is remembered, so that at the end it can tell which keys nobody read: those that are known to
change the result are refused, those that are known not to are let pass, and the rest is listed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from kbit._core import ModelFormatError, UnsupportedModelError
from kbit.config_keys import (
    ACTIVATIONS,
    CHANGES_RESULT,
    IRRELEVANT,
    LIMITS,
    ROPE_TYPES,
    SPELLINGS,
)
from kbit.spec import RopeSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Unread:
    """Keys of a config that the spec does not depend on."""

    ignored: tuple[str, ...]
    """Known not to change the result."""
    unknown: tuple[str, ...]
    """Unknown to kbit."""


class Config:
    """Hyper-parameters by their newest Hugging Face names.

    Args:
        data: `config.json`, parsed, or the same keys made from GGUF metadata.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = dict(data)
        self._read: set[str] = set()

    def default(self, **values: Any) -> None:
        """Gives keys that the config does not have at all (null counts as given) a value."""
        for key, value in values.items():
            if not self.has(key):
                self._data[key] = value

    def has(self, key: str) -> bool:
        """Whether the config has a key, under any spelling."""
        return any(name in self._data for name in (key, *SPELLINGS.get(key, ())))

    def get(self, key: str) -> Any:
        """The raw value under any spelling of `key`; None where it is absent or null."""
        spellings = (key, *SPELLINGS.get(key, ()))
        self._read.update(spellings)
        found = [(name, self._data[name]) for name in spellings if self._data.get(name) is not None]
        for name, value in found[1:]:
            if value != found[0][1]:
                raise ModelFormatError(
                    f"config: {found[0][0]} = {found[0][1]!r:.80} and {name} = {value!r:.80} "
                    "are two names of one thing"
                )
        return found[0][1] if found else None

    def optional_integer(self, key: str, low: int = 1) -> int | None:
        """An integer from `low` to its limit; None where it is absent."""
        value = self.get(key)
        return None if value is None else checked_integer(value, key, low)

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        """An integer from `low` to its limit; `default` where it is absent, required without."""
        value = self.optional_integer(key, low)
        return required(key, default if value is None else value)

    def optional_number(self, key: str, low: float = -math.inf) -> float | None:
        """A finite number of at least `low`; None where it is absent."""
        value = self.get(key)
        return None if value is None else checked_number(value, key, low)

    def number(self, key: str, default: float | None = None, low: float = -math.inf) -> float:
        """A finite number of at least `low`; `default` where it is absent, required without."""
        value = self.optional_number(key, low)
        return required(key, default if value is None else value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` where it is absent."""
        value = self.get(key)
        return default if value is None else checked(value, key, bool)

    def sequence(self, key: str, length: int | None = None) -> list[Any] | None:
        """A list, of `length` items where one is given; None where it is absent."""
        value = self.get(key)
        if value is None:
            return None
        items = cast("list[Any]", checked(value, key, list))
        if length is not None and len(items) != length:
            raise ModelFormatError(f"config: {key} must have {length} items, has {len(items)}")
        return items

    def section(self, key: str) -> Mapping[str, Any]:
        """An object; empty where it is absent."""
        value = self.get(key)
        return {} if value is None else cast("dict[str, Any]", checked(value, key, dict))

    def activation(self, key: str = "hidden_act", default: str | None = None) -> str:
        """An activation by the engine's name."""
        value = checked(required(key, self.get(key) or default), key, str)
        if value not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise UnsupportedModelError(f"config: {key} is {value!r:.80}, kbit has {known}")
        return ACTIVATIONS[value]

    def only(self, key: str, *values: Any) -> None:
        """Refuses every value of `key` but `values` (and its absence)."""
        value = self.get(key)
        if value is not None and value not in values:
            allowed = " or ".join(map(repr, values))
            raise UnsupportedModelError(f"config: {key} is {value!r:.80}, kbit runs {allowed}")

    def head_dim(self) -> int:
        """`head_dim`, or the heads' share of `hidden_size`."""
        given = self.optional_integer("head_dim")
        if given is not None:
            return given
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if hidden % heads:
            raise ModelFormatError(
                f"config: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
            )
        return hidden // heads

    def windows(self, default: Sequence[bool] | None = None) -> tuple[int | None, ...]:
        """The sliding window of every layer.

        Args:
            default: Which layers have the window where `layer_types` is absent; None: all.
        """
        count = self.integer("num_hidden_layers")
        window = self.optional_integer("sliding_window")
        kinds = self.sequence("layer_types", count)
        local = [True] * count if default is None else default
        if kinds is not None:
            known = ("sliding_attention", "full_attention")
            for kind in kinds:
                if kind not in known:
                    raise UnsupportedModelError(
                        f"config: layer_types has {kind!r:.80}, kbit runs {' and '.join(known)}"
                    )
            local = [kind == "sliding_attention" for kind in kinds]
            if any(local) and window is None:
                raise ModelFormatError(
                    "config: layer_types has sliding_attention, sliding_window is absent"
                )
        return tuple(window if here else None for here in local)

    def rope(
        self,
        *,
        theta: float = 10_000.0,
        fraction: float = 1.0,
        kind: str | None = None,
        key: str = "rope_theta",
        scaled: bool = True,
        types: Mapping[str, str] | None = None,
    ) -> RopeSpec:
        """The rotary embedding, by `rope_parameters` or the older `rope_theta` and `rope_scaling`.

        Args:
            theta: Base where the config gives none.
            fraction: Rotated share of a head where the config gives none.
            kind: The layer type meant, where `rope_parameters` has one set for each.
            key: The older key of the base.
            scaled: False: the older `rope_scaling` is for other layers than these.
            types: Rope types that this architecture means differently.
        """
        place = "rope_parameters"
        parameters, old = self.section(place), self.section("rope_scaling")
        if kind is not None and isinstance(parameters.get(kind), dict):
            place, parameters = f"rope_parameters.{kind}", parameters[kind]
        elif not parameters and scaled:
            place, parameters = "rope_scaling", old
        values = {name: value for name, value in parameters.items() if value is not None}
        older_type = values.pop("type", "default")
        rope_type = checked(values.pop("rope_type", older_type), f"{place}.rope_type", str)
        rope_type = {"su": "longrope", **(types or {})}.get(rope_type, rope_type)
        if rope_type not in ROPE_TYPES:
            known = ", ".join(ROPE_TYPES)
            raise UnsupportedModelError(f"config: rope_type is {rope_type!r:.80}, kbit has {known}")
        base = values.pop("rope_theta", self.number(key, theta))
        share = values.pop("partial_rotary_factor", self.number("partial_rotary_factor", fraction))
        head_dim = self.head_dim()
        dim = self.optional_integer("rotary_dim")
        if dim is None:
            dim = int(head_dim * min(checked_number(share, "partial_rotary_factor", 0.0), 2.0))
        if not 2 <= dim <= head_dim or dim % 2:
            raise ModelFormatError(
                f"config: {dim} rotated elements of a head of {head_dim}: must be even and fit"
            )
        return RopeSpec(
            rope_type=rope_type,
            rope_theta=checked_number(base, key, 1.0 + 1e-6),
            rotary_dim=dim,
            **self._scaling(rope_type, values, place, dim // 2),
        )

    def _scaling(
        self, rope_type: str, values: dict[str, Any], place: str, pairs: int
    ) -> dict[str, Any]:
        """The fields of a scaled rope, each checked."""
        original = values.pop("original_max_position_embeddings", None)
        outer = self.optional_integer("original_max_position_embeddings")
        values.pop("finetuned", None)
        keys = ROPE_TYPES[rope_type]
        if unread := sorted(set(values) - set(keys)):
            raise UnsupportedModelError(
                f"config: {place} of type {rope_type} has {', '.join(unread)}, "
                "which kbit does not read"
            )
        if not keys:
            return {}
        fields: dict[str, Any] = {}
        for name, value in values.items():
            if name == "truncate":
                fields[name] = checked(value, f"{place}.{name}", bool)
            elif name in ("short_factor", "long_factor"):
                items = cast("list[Any]", checked(value, f"{place}.{name}", list))
                if len(items) != pairs:
                    raise ModelFormatError(
                        f"config: {place}.{name} must have {pairs} items, has {len(items)}"
                    )
                fields[name] = tuple(checked_number(item, name, 1e-6) for item in items)
            else:
                fields[name] = checked_number(value, f"{place}.{name}", 0.0)
        positions = self.integer("max_position_embeddings")
        if rope_type != "linear":
            # Dynamic scaling calls the context before scaling `max_position_embeddings`.
            given = positions if rope_type == "dynamic" else outer or original or positions
            fields["original_max_position_embeddings"] = checked_integer(
                given, "original_max_position_embeddings", 1
            )
        if rope_type in ("yarn", "longrope") and "factor" not in fields:
            fields["factor"] = positions / fields["original_max_position_embeddings"]
        needed = {"factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"}
        for name in keys:
            if name in needed and not fields.get(name):
                raise ModelFormatError(
                    f"config: {place} of type {rope_type} needs {name} above 0, "
                    f"has {fields.get(name)}"
                )
        return fields

    def unread(self) -> Unread:
        """What nobody asked for, once the spec is made.

        Raises:
            UnsupportedModelError: A key among it changes what the model computes.
        """
        newest = {old: new for new, older in SPELLINGS.items() for old in older}
        names = {name for name, value in self._data.items() if value is not None} - self._read
        for name in sorted(names):
            neutral = CHANGES_RESULT.get(newest.get(name, name))
            if neutral is not None and self._data[name] not in neutral:
                raise UnsupportedModelError(
                    f"config: {name} is {self._data[name]!r:.80}, "
                    "which kbit does not compute for this architecture"
                )
        known = {n for n in names if newest.get(n, n) in IRRELEVANT | CHANGES_RESULT.keys()}
        return Unread(tuple(sorted(known)), tuple(sorted(names - known)))


def required(key: str, value: T | None) -> T:
    """`value`, which the config must have.

    Raises:
        ModelFormatError: It is None; the sentence names all spellings of the key.
    """
    if value is None:
        raise ModelFormatError(f"config lacks {' or '.join((key, *SPELLINGS.get(key, ())))}")
    return value


def checked(value: Any, key: str, kind: type[T]) -> T:
    """`value` as a `kind`.

    Raises:
        ModelFormatError: It is none; the sentence names the key and the value.
    """
    if not isinstance(value, kind):
        raise ModelFormatError(f"config: {key} must be a {kind.__name__}, is {value!r:.80}")
    return value


def checked_integer(value: Any, key: str, low: int) -> int:
    """`value` as an integer from `low` to the key's limit.

    Raises:
        ModelFormatError: It is none; the sentence names the key, the value and the range.
    """
    high = LIMITS.get(key, 2**31 - 1)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ModelFormatError(
            f"config: {key} must be an integer from {low} to {high}, is {value!r:.80}"
        )
    return value


def checked_number(value: Any, key: str, low: float) -> float:
    """`value` as a finite number of at least `low` and a magnitude that f32 holds.

    Raises:
        ModelFormatError: It is none; the sentence names the key and the value.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and low <= value and abs(value) <= 1e30:
        return float(value)
    bound = "" if low == -math.inf else f" of at least {low:g}"
    raise ModelFormatError(f"config: {key} must be a finite number{bound}, is {value!r:.80}")

"""What a model is, as data: the Python face of `rust/model/src/spec.rs`.

Field names are Hugging Face's where they exist. Presence is a switch: biases, q/k norms, norms
around the blocks, learned positions, sinks and an untied head exist when their canonical tensor
exists (docs/adding.md).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar, Union

from kbit._core import ModelFormatError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding by the names of `config.json`."""

    rope_type: str
    """`default`, `linear`, `dynamic`, `yarn`, `llama3` or `longrope`."""
    rope_theta: float
    """Base of the geometric frequencies."""
    rotary_dim: int
    """Rotated dimensions of a head (even, at most `head_dim`)."""
    factor: float | None = None
    """Scaling factor of every type but `default`."""
    original_max_position_embeddings: int | None = None
    """Context before scaling."""
    low_freq_factor: float | None = None
    """llama3."""
    high_freq_factor: float | None = None
    """llama3."""
    attention_factor: float | None = None
    """YaRN and LongRoPE."""
    beta_fast: float | None = None
    """YaRN."""
    beta_slow: float | None = None
    """YaRN."""
    mscale: float | None = None
    """YaRN."""
    mscale_all_dim: float | None = None
    """YaRN."""
    truncate: bool | None = None
    """YaRN: whether the ramp's ends are rounded outwards."""
    short_factor: tuple[float, ...] | None = None
    """LongRoPE, one per pair."""
    long_factor: tuple[float, ...] | None = None
    """LongRoPE, one per pair."""


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """Mixture of experts of a layer."""

    num_experts: int
    """Experts."""
    num_experts_per_tok: int
    """Chosen per token."""
    moe_intermediate_size: int
    """Width of an expert."""
    routing: str
    """`softmax_topk`, `softmax_topk_renormalise` or `topk_softmax`."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What differs between layers."""

    rope: int | None = None
    """Index into `ModelSpec.ropes`; None: no rotation."""
    sliding_window: int | None = None
    """Keys at `pos - sliding_window + 1 ..= pos` only."""
    experts: bool = False
    """True: a mixture of experts instead of the plain MLP."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder, described."""

    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the MLP."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key-value heads."""
    head_dim: int
    """Elements of a head."""
    max_position_embeddings: int
    """Positions the model accepts."""
    layers: tuple[LayerSpec, ...]
    """One per layer."""
    ropes: tuple[RopeSpec, ...]
    """Rotary tables."""
    norm: str
    """`rms` or `layer`."""
    norm_eps: float
    """Epsilon of all norms."""
    hidden_act: str
    """`silu`, `gelu`, `gelu_tanh`, `quick_gelu`, `relu`, `relu2` or `identity`."""
    mlp: str
    """`plain` (down(act(up))), `gated` (down(act(gate) * up)) or `gated_clamped`."""
    mlp_alpha: float | None = None
    """Slope of `gated_clamped`."""
    mlp_limit: float | None = None
    """Limit of `gated_clamped`."""
    parallel_residual: bool = False
    """Attention and MLP read the same residual stream (GPT-J, GPT-NeoX, Phi)."""
    embed_scale: float = 1.0
    """Factor of token embeddings."""
    position_offset: int = 0
    """Added to a position before it indexes the learned positions (OPT: 2)."""
    attention_scale: float
    """Factor of q . k."""
    attn_logit_softcapping: float | None = None
    """`cap * tanh(s / cap)` of attention logits."""
    clip_qkv: float | None = None
    """q, k, v clamped."""
    alibi: bool = False
    """ALiBi biases."""
    residual_scale: float = 1.0
    """Factor of what a block adds to the stream."""
    logit_scale: float = 1.0
    """Factor of logits."""
    final_logit_softcapping: float | None = None
    """`cap * tanh(logit / cap)`."""
    moe: ExpertsSpec | None = None
    """Mixture of experts."""

    def to_json(self) -> str:
        """The spec as the engine reads it; absent fields are left out."""
        return json.dumps(_plain(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The spec that `to_json` (or the engine) wrote.

        Raises:
            ModelFormatError: `text` is not a spec; the sentence names the field.
        """
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(f"a model spec must be JSON: {error}") from None
        return _read(data, cls, "spec")


def _plain(value: Any) -> Any:
    """Dataclasses as dicts without absent fields, tuples as lists."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _plain(item) for name, item in fields.items() if item is not None}
    if isinstance(value, tuple):
        return [_plain(item) for item in typing.cast("tuple[Any, ...]", value)]
    return value


def _read(data: Any, kind: type[T], place: str) -> T:
    """`data` as `kind`: a dataclass, tuple, optional, number, string or bool."""
    if dataclasses.is_dataclass(kind):
        return _read_fields(data, kind, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return typing.cast("T", None if data is None else _read(data, arguments[0], place))
    if origin is tuple and isinstance(data, list):
        items = enumerate(typing.cast("list[Any]", data))
        return typing.cast("T", tuple(_read(v, arguments[0], f"{place}[{i}]") for i, v in items))
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return typing.cast("T", float(data))
    if type(data) is not kind:
        wanted = getattr(kind, "__name__", "list")
        raise ModelFormatError(f"{place} must be a {wanted}, is {type(data).__name__}")
    return typing.cast("T", data)


def _read_fields(data: Any, kind: type[T], place: str) -> T:
    if not isinstance(data, dict):
        raise ModelFormatError(f"{place} must be an object, is {type(data).__name__}")
    data = typing.cast("dict[str, Any]", data)
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(data) - set(hints)):
        raise ModelFormatError(f"{place} has unknown fields {', '.join(unknown)}")
    values = {name: _read(value, hints[name], f"{place}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ModelFormatError(f"{place} lacks a field: {error}") from None

"""What nearly all decoders have in common: the spec that an architecture varies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kbit._core import ModelFormatError
from kbit.config import Config
from kbit.spec import LayerSpec, ModelSpec, RopeSpec


def decoder(
    config: Config,
    *,
    eps: float,
    ropes: tuple[RopeSpec, ...] | None = None,
    windows: Sequence[int | None] | None = None,
    **fields: Any,
) -> ModelSpec:
    """The spec of a decoder with the usual keys: RMS norms, a gated SiLU MLP, rotated heads.

    Args:
        config: Hyper-parameters.
        eps: Epsilon of the norms where the config gives none.
        ropes: Rotary embeddings, the first for all layers; None: the config's one.
        windows: Sliding window of every layer; None: there is none.
        **fields: Fields of `ModelSpec` that differ.

    Raises:
        ModelFormatError: A value is missing, out of range, or does not fit another.
    """
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelFormatError(
            f"config: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if ropes is None:
        ropes = (config.rope(),)
    count = config.integer("num_hidden_layers")
    rope = 0 if ropes else None
    head_dim = config.head_dim()
    usual = {
        "intermediate_size": lambda: config.integer("intermediate_size"),
        "max_position_embeddings": lambda: _positions(config, ropes),
        "norm": lambda: "rms",
        "norm_eps": lambda: config.number("norm_eps", eps, 0.0),
        "hidden_act": lambda: config.activation(default="silu"),
        "mlp": lambda: "gated",
        "attention_scale": lambda: head_dim**-0.5,
    }
    spec = ModelSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        layers=tuple(
            LayerSpec(rope=rope, sliding_window=window) for window in windows or (None,) * count
        ),
        ropes=ropes,
        **{name: make() for name, make in usual.items() if name not in fields},
        **fields,
    )
    _check(spec)
    return spec


def with_layers(spec: ModelSpec, **columns: Sequence[Any]) -> ModelSpec:
    """`spec` with fields of its layers replaced, one value a layer."""
    layers = list(spec.layers)
    for name, column in columns.items():
        pairs = zip(layers, column, strict=True)
        layers = [dataclasses.replace(layer, **{name: value}) for layer, value in pairs]
    return dataclasses.replace(spec, layers=tuple(layers))


def _positions(config: Config, ropes: Sequence[RopeSpec]) -> int:
    """Positions a model accepts: dynamic and YaRN configs may name the context before scaling."""
    most = float(config.integer("max_position_embeddings"))
    for rope in ropes:
        if rope.rope_type in ("dynamic", "yarn"):
            original = rope.original_max_position_embeddings or 0
            most = max(most, original * (rope.factor or 1.0))
    return int(min(most, 2**31 - 1))


def _check(spec: ModelSpec) -> None:
    """Bounds on products and between values, which single values cannot have."""
    widths = {
        "num_attention_heads * head_dim": spec.num_attention_heads * spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
    }
    for name, width in widths.items():
        if width * spec.hidden_size > 2**38:
            raise ModelFormatError(
                f"config: {name} = {width} times hidden_size = {spec.hidden_size} "
                f"is above {2**38}: no such matrix exists"
            )
    moe = spec.moe
    if moe and moe.num_experts_per_tok > moe.num_experts:
        raise ModelFormatError(
            f"config: num_experts_per_tok {moe.num_experts_per_tok} "
            f"is above num_experts {moe.num_experts}"
        )

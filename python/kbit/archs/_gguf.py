"""GGUF's names for what `config.json` and canonical names say: one table of keys, one of tensors.

llama.cpp's converter has already folded in what Hugging Face leaves to the model (Gemma's `1 + w`,
GPT-2's transposes, the per-head order of fused qkv); it has added one thing of its own: where its
graph rotates neighbouring elements, q and k rows are interleaved (`Gguf.interleaved`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from kbit._core import ModelFormatError, TensorFile, UnsupportedModelError
from kbit.config import Config
from kbit.names import NameMap, Target, To, fused_qkv, rope_halves, select_expert, targets, to

KEYS: dict[str, tuple[str, ...]] = {
    "max_position_embeddings": ("context_length",),
    "hidden_size": ("embedding_length",),
    "num_hidden_layers": ("block_count",),
    "intermediate_size": ("feed_forward_length",),
    "num_attention_heads": ("attention.head_count",),
    "num_key_value_heads": ("attention.head_count_kv",),
    "head_dim": ("attention.key_length",),
    "norm_eps": ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
    "rope_theta": ("rope.freq_base",),
    "rotary_dim": ("rope.dimension_count",),
    "sliding_window": ("attention.sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "clip_qkv": ("attention.clamp_kqv",),
    "use_parallel_residual": ("use_parallel_residual",),
    "num_experts": ("expert_count",),
    "num_experts_per_tok": ("expert_used_count",),
    "moe_intermediate_size": ("expert_feed_forward_length",),
    "attention_multiplier": ("attention.scale",),
    "embedding_multiplier": ("embedding_scale",),
    "residual_multiplier": ("residual_scale",),
    "logits_scaling": ("logit_scale",),
}
"""Keys of `config.json` to metadata keys, which begin with the architecture's name."""

SWITCHES = (
    *("use_parallel_residual", "attention_multiplier", "embedding_multiplier"),
    *("residual_multiplier", "logits_scaling"),
)
"""Those of `KEYS` that a spec knows by what they do to it, so that a file is written from the config."""

SCALING: dict[str, str] = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
"""Keys of `rope_parameters` to metadata keys."""

TENSORS: dict[str, Target] = {
    "token_embd": "embed",
    "token_embd_norm": "embed.norm",
    "position_embd": "embed.positions",
    "output_norm": "final_norm",
    "output": "head",
    "blk.{i}.attn_norm": "layers.{i}.attn.in_norm",
    "blk.{i}.attn_q": "layers.{i}.attn.q",
    "blk.{i}.attn_k": "layers.{i}.attn.k",
    "blk.{i}.attn_v": "layers.{i}.attn.v",
    "blk.{i}.attn_qkv": fused_qkv("layers.{i}.attn"),
    "blk.{i}.attn_output": "layers.{i}.attn.o",
    "blk.{i}.attn_q_norm": "layers.{i}.attn.q_norm",
    "blk.{i}.attn_k_norm": "layers.{i}.attn.k_norm",
    "blk.{i}.attn_sinks.weight": "layers.{i}.attn.sinks",
    "blk.{i}.post_attention_norm": "layers.{i}.attn.out_norm",
    "blk.{i}.ffn_norm": "layers.{i}.mlp.in_norm",
    "blk.{i}.ffn_gate": "layers.{i}.mlp.gate",
    "blk.{i}.ffn_up": "layers.{i}.mlp.up",
    "blk.{i}.ffn_down": "layers.{i}.mlp.down",
    "blk.{i}.post_ffw_norm": "layers.{i}.mlp.out_norm",
    "blk.{i}.ffn_gate_inp": "layers.{i}.mlp.router",
    "blk.{i}.ffn_gate_exps": to("layers.{i}.mlp.experts.{e}.gate", select_expert),
    "blk.{i}.ffn_up_exps": to("layers.{i}.mlp.experts.{e}.up", select_expert),
    "blk.{i}.ffn_down_exps": to("layers.{i}.mlp.experts.{e}.down", select_expert),
    # Before experts were stacked.
    "blk.{i}.ffn_gate.{e}": "layers.{i}.mlp.experts.{e}.gate",
    "blk.{i}.ffn_up.{e}": "layers.{i}.mlp.experts.{e}.up",
    "blk.{i}.ffn_down.{e}": "layers.{i}.mlp.experts.{e}.down",
}
"""Tensor patterns to canonical patterns."""

IGNORED = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
    "blk.{i}.attn_rot_embd.weight",
)
"""Tables of the rotary embedding; the first three are read as hyper-parameters."""


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp's files of an architecture differ from the tables above."""

    name: str
    """`general.architecture`."""
    interleaved: bool = False
    """Rotated pairs lie side by side."""
    experts: bool = False
    """Of architectures that share a name: this one has experts."""
    names: Mapping[str, Target] = field(default_factory=dict[str, Target])
    """Tensor patterns that mean something else here."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keys of `config.json` that llama.cpp takes for granted."""
    keys: Mapping[str, str] = field(default_factory=dict[str, str])
    """Metadata keys (without the name) by what `config.json` calls them here."""
    scaling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The same of `rope_parameters`, where the rope is scaled."""
    wide_scale_layers: int | None = None
    """Depth of the one Gemma whose q . k is scaled by hidden_size / heads, not by head_dim."""


def gguf_names(gguf: Gguf, names: NameMap) -> NameMap:
    """The name map of its GGUF files: the shared table as far as the architecture goes."""
    known = {target.name for value in names.names.values() for target in targets(value)}
    stems = known | {name.removesuffix(".weight").removesuffix(".bias") for name in known}
    found: dict[str, Target] = {}
    for pattern, value in (TENSORS | dict(gguf.names)).items():
        if all(target.name in stems for target in targets(value)):
            found[pattern] = tuple(_halved(t) if gguf.interleaved else t for t in targets(value))
    return NameMap(found, ignored=IGNORED, optional=names.optional)


def _halved(target: To) -> To:
    """Rows of q and k with their rotated pairs as halves."""
    rotated = target.name.endswith((".attn.q", ".attn.k"))
    return replace(target, steps=(*target.steps, rope_halves)) if rotated else target


def gguf_config(gguf: Gguf, files: Sequence[TensorFile]) -> dict[str, Any]:
    """`config.json` as the metadata and the tensors of GGUF files tell it.

    Raises:
        ModelFormatError: The embedding is missing.
        UnsupportedModelError: Layers or heads differ in a way that kbit does not run.
    """
    metadata = files[0].metadata
    prefix = f"{metadata['general.architecture']}."

    def value(key: str) -> Any:
        found = metadata.get(prefix + key)
        if isinstance(found, list) and found:
            items = cast("list[Any]", found)
            if any(item != items[0] for item in items):
                raise UnsupportedModelError(f"GGUF: {prefix}{key} differs between layers")
            return items[0]
        return cast("Any", found)

    config: dict[str, Any] = {}
    other = {key: (own,) for key, own in gguf.keys.items()}
    usual = {key: own for key, own in KEYS.items() if not set(own) & set(gguf.keys.values())}
    for name, keys in (usual | other).items():
        found = [v for v in map(value, keys) if v is not None]
        if found:
            config[name] = found[0]
    for name in ("num_experts", "num_experts_per_tok", "sliding_window", "attention_multiplier"):
        if config.get(name) == 0:
            del config[name]
    if (width := value("attention.value_length")) not in (None, config.get("head_dim", width)):
        raise UnsupportedModelError(
            f"GGUF: values of {width} elements, keys of {config['head_dim']}"
        )
    # Keys at which llama.cpp's absence is Hugging Face's null.
    config = {"sliding_window": None, **config}
    if gguf.wide_scale_layers:
        config["query_pre_attn_scalar"] = config.get("head_dim")
        if config.get("num_hidden_layers") == gguf.wide_scale_layers:
            view = Config(config)
            share = view.integer("hidden_size") / view.integer("num_attention_heads")
            config["query_pre_attn_scalar"] = share
    config["vocab_size"] = _rows(files, "token_embd.weight")
    rope = _rope(config, value, files)
    if rope:
        config["rope_scaling"] = rope | dict(gguf.scaling)
    return config | dict(gguf.config)


def _rope(config: dict[str, Any], value: Any, files: Sequence[TensorFile]) -> dict[str, Any]:
    """`rope_scaling`."""
    kind = value("rope.scaling.type") or "none"
    scaling = {name: found for name, key in SCALING.items() if (found := value(key)) is not None}
    short, long = (_factors(files, f"rope_factors_{name}.weight") for name in ("short", "long"))
    if short and long:
        scaling = {k: v for k, v in scaling.items() if not k.startswith("beta")}
        return {**scaling, "rope_type": "longrope", "short_factor": short, "long_factor": long}
    if factors := _factors(files, "rope_freqs.weight"):
        # Llama 3's scaling, worked out for every pair: the same before and after the context.
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config.get("max_position_embeddings"),
        }
    if kind == "none":
        factor = value("rope.scale_linear")
        return {"rope_type": "linear", "factor": factor} if factor not in (None, 0, 1) else {}
    if kind == "linear":
        scaling = {"factor": scaling.get("factor")}
    # llama.cpp multiplies this one by YaRN's own.
    if kind == "yarn" and scaling.pop("attention_factor", 1.0) != 1.0:
        raise UnsupportedModelError("GGUF: rope.scaling.attn_factor with YaRN")
    return {**scaling, "rope_type": kind}


def _find(files: Sequence[TensorFile], name: str) -> TensorFile | None:
    return next((file for file in files if name in file.names()), None)


def _rows(files: Sequence[TensorFile], name: str) -> int:
    file = _find(files, name)
    if file is None or len(file.shape(name)) != 2:
        raise ModelFormatError(f"GGUF: no matrix {name}")
    return file.shape(name)[0]


def _factors(files: Sequence[TensorFile], name: str) -> list[float] | None:
    file = _find(files, name)
    if file is None:
        return None
    if len(file.shape(name)) != 1 or file.shape(name)[0] > 2**14:
        raise ModelFormatError(f"GGUF: {name} must have one entry a pair, has {file.shape(name)}")
    return [float(x) for x in file.read(name)]

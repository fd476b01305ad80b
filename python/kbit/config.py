"""A checkpoint's hyper-parameters under one spelling, every value checked before it is used.

`config.json` has had several spellings: `n_embd` and `hidden_size`, `rope_scaling` and
`rope_parameters`, `torch_dtype` and `dtype`. `Config` answers by the newest one. What it is asked
for is remembered, so that at the end it can tell which keys nobody read: those that are known to
change the result are refused, those that are known not to are let pass, and the rest is listed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from kbit._core import ModelFormatError, UnsupportedModelError
from kbit.spec import LayerSpec, ModelSpec, RopeSpec

SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "n_embed"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "max_position_embeddings": ("n_positions",),
    "hidden_act": ("activation_function",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "num_experts": ("num_local_experts",),
    "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct",),
    "dtype": ("torch_dtype",),
}
"""Older names of a key."""

LIMITS: dict[str, int] = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "rotary_dim": 2**14,
    "num_experts": 2**12,
    "num_experts_per_tok": 2**12,
    "moe_intermediate_size": 2**22,
}
"""Largest value of an integer key, far above any model; other keys go to 2**31 - 1."""

ACTIVATIONS: dict[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "linear": "identity",
}
"""Hugging Face's activation names to the engine's."""

ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
"""Keys that a rope type reads."""

CHANGES_RESULT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "alibi": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "attn_temperature_tuning": (False, None),
    "clip_qkv": (None,),
    "do_layer_norm_before": (True, None),
    "embedding_multiplier": (1.0, None),
    "final_logit_softcapping": (None,),
    "first_k_dense_replace": (0, None),
    "hidden_act": (None,),
    "is_encoder_decoder": (False, None),
    "layer_types": (None,),
    "logit_scale": (1.0, None),
    "logits_scaling": (1.0, None),
    "no_rope_layers": (None,),
    "norm_eps": (None,),
    "num_experts": (None,),
    "partial_rotary_factor": (1.0, None),
    "position_embedding_type": ("rope", "absolute", None),
    "q_lora_rank": (None,),
    "qk_layernorm": (False, None),
    "query_pre_attn_scalar": (None,),
    "_remove_final_layer_norm": (False, None),
    "residual_multiplier": (1.0, None),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "scale_attn_weights": (True, None),
    "sliding_window": (None,),
    "swiglu_limit": (None,),
    "text_config": (None,),
    "use_bidirectional_attention": (False, None),
    "use_parallel_residual": (False, None),
    "use_qk_norm": (False, None),
    "use_sliding_window": (False, None),
    "vision_config": (None,),
    "word_embed_proj_dim": (None,),
}
"""Keys that change what a model computes, with the values at which they do nothing."""

IRRELEVANT: frozenset[str] = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path activation_dropout
    architectures attention_bias attention_dropout attention_probs_dropout_prob attn_pdrop
    auto_map bad_words_ids begin_suppress_tokens bias bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout classifier_dropout_prob
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping embd_pdrop embed_dropout embedding_dropout enable_bias
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout
    hidden_dropout_prob id2label init_std initializer_range is_decoder label2id
    layer_norm_elementwise_affine layerdrop length_penalty max_length min_length mlp_bias
    model_type n_ctx no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    offset_alibi output_attentions output_hidden_states output_past output_router_logits
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    quantization_config remove_invalid_values reorder_and_upcast_attn repetition_penalty
    resid_dropout resid_pdrop residual_dropout return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id skip_bias_add skip_bias_add_qkv
    slow_but_exact summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torchscript
    transformers_version type_vocab_size typical_p unk_token_id use_bfloat16 use_bias use_cache
    use_qkv_bias
    """.split()  # noqa: SIM905 (a list would be a page long)
)
"""Keys that do not: training, tokens, generation, what the tensors tell (biases, tying)."""


class Config:
    """Hyper-parameters by their newest Hugging Face names.

    Args:
        data: `config.json`, parsed, or the same keys made from GGUF metadata.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """The raw value under any spelling of `key`; None where it is absent or null."""
        spellings = (key, *SPELLINGS.get(key, ()))
        self._read.update(spellings)
        found = [(name, self._data[name]) for name in spellings if self._data.get(name) is not None]
        for name, value in found[1:]:
            if value != found[0][1]:
                raise ModelFormatError(
                    f"config says {found[0][0]} = {found[0][1]!r} and {name} = {value!r}: the same thing by two names"
                )
        return found[0][1] if found else None

    def optional_integer(self, key: str, low: int = 1) -> int | None:
        """An integer from `low` to its limit; None where it is absent."""
        value = self.get(key)
        return None if value is None else checked_integer(value, key, low)

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        """An integer from `low` to its limit; `default` where it is absent, required without one."""
        value = self.optional_integer(key, low)
        if value is None:
            value = default
        return self._required(key, value)

    def optional_number(self, key: str, low: float = -math.inf) -> float | None:
        """A finite number of at least `low`; None where it is absent."""
        value = self.get(key)
        return None if value is None else checked_number(value, key, low)

    def number(self, key: str, default: float | None = None, low: float = -math.inf) -> float:
        """A finite number of at least `low`; `default` where it is absent, required without one."""
        value = self.optional_number(key, low)
        if value is None:
            value = default
        return self._required(key, value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` where it is absent."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelFormatError(f"config: {key} must be true or false, is {value!r:.80}")
        return value

    def sequence(self, key: str, length: int | None = None) -> list[Any] | None:
        """A list, of `length` items where one is given; None where it is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise ModelFormatError(f"config: {key} must be a list, is {value!r:.80}")
        items = cast("list[Any]", value)
        if length is not None and len(items) != length:
            raise ModelFormatError(f"config: {key} must have {length} items, has {len(items)}")
        return items

    def section(self, key: str) -> Mapping[str, Any]:
        """An object; empty where it is absent."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ModelFormatError(f"config: {key} must be an object, is {value!r:.80}")
        return cast("dict[str, Any]", value)

    def activation(self, key: str = "hidden_act", default: str | None = None) -> str:
        """An activation by the engine's name."""
        value = self._required(key, self.get(key) or default)
        if not isinstance(value, str):
            raise ModelFormatError(f"config: {key} must be a name, is {value!r:.80}")
        if value not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"config: {key} is {value!r:.80}, kbit has {', '.join(sorted(ACTIVATIONS))}"
            )
        return ACTIVATIONS[value]

    def only(self, key: str, *values: Any) -> None:
        """Refuses every value of `key` but `values` (and its absence)."""
        value = self.get(key)
        if value is not None and value not in values:
            raise UnsupportedModelError(
                f"config: {key} is {value!r:.80}, kbit runs {' or '.join(map(repr, values))}"
            )

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
        kinds = self.layer_types()
        if kinds is not None:
            local = [kind == "sliding_attention" for kind in kinds]
            if any(local) and window is None:
                raise ModelFormatError(
                    "config: layer_types has sliding_attention, sliding_window is absent"
                )
        else:
            local = [True] * count if default is None else default
        return tuple(window if here else None for here in local)

    def layer_types(self) -> list[str] | None:
        """`layer_types`: `sliding_attention` or `full_attention` for every layer; None where it is absent."""
        kinds = self.sequence("layer_types", self.integer("num_hidden_layers"))
        for kind in kinds or ():
            if kind not in ("sliding_attention", "full_attention"):
                raise UnsupportedModelError(
                    f"config: layer_types has {kind!r:.80}, kbit runs sliding_attention and full_attention"
                )
        return kinds

    def rope(
        self,
        *,
        theta: float = 10_000.0,
        fraction: float = 1.0,
        kind: str | None = None,
        scaled: bool = True,
    ) -> RopeSpec:
        """The rotary embedding, from `rope_parameters` or the older `rope_theta` and `rope_scaling`.

        Args:
            theta: Base where the config gives none.
            fraction: Rotated share of a head where the config gives none.
            kind: The layer type whose parameters are wanted, where `rope_parameters` has one set for each.
            scaled: False: the older `rope_scaling` is for other layers than these.
        """
        place = "rope_parameters"
        parameters = self.section(place)
        old = self.section("rope_scaling")
        if kind is not None and isinstance(parameters.get(kind), dict):
            place, parameters = f"rope_parameters.{kind}", parameters[kind]
        elif not parameters and scaled:
            place, parameters = "rope_scaling", old
        values = {name: value for name, value in parameters.items() if value is not None}
        rope_type = values.pop("rope_type", values.pop("type", "default"))
        values.pop("type", None)
        rope_type = (
            {"su": "longrope"}.get(rope_type, rope_type)
            if isinstance(rope_type, str)
            else rope_type
        )
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"config: rope_type is {rope_type!r:.80}, kbit has {', '.join(ROPE_TYPES)}"
            )
        outer_theta, outer_fraction = (
            self.optional_number("rope_theta"),
            self.optional_number("partial_rotary_factor"),
        )
        theta = checked_number(values.pop("rope_theta", outer_theta or theta), "rope_theta", 1.0)
        share = values.pop(
            "partial_rotary_factor", fraction if outer_fraction is None else outer_fraction
        )
        fields = self._scaling(rope_type, values, place)
        dim = self.optional_integer("rotary_dim") or self.head_dim() * checked_number(
            share, "partial_rotary_factor", 0.0
        )
        if not 2 <= dim <= self.head_dim() or int(dim) % 2:
            raise ModelFormatError(
                f"config: {dim} rotated dimensions of a head of {self.head_dim()}: must be even and fit"
            )
        for name in ("short_factor", "long_factor"):
            if name in fields and len(fields[name]) != int(dim) // 2:
                raise ModelFormatError(
                    f"config: {place}.{name} must have {int(dim) // 2} items, has {len(fields[name])}"
                )
        return RopeSpec(rope_type=rope_type, rope_theta=theta, rotary_dim=int(dim), **fields)

    def _scaling(self, rope_type: str, values: dict[str, Any], place: str) -> dict[str, Any]:
        """The fields of a scaled rope, each checked."""
        original = values.pop("original_max_position_embeddings", None)
        outer = self.optional_integer("original_max_position_embeddings")
        unread = sorted(set(values) - {*ROPE_TYPES[rope_type], "finetuned"})
        if unread:
            raise UnsupportedModelError(
                f"config: {place} of type {rope_type} has {', '.join(unread)}, which kbit does not read"
            )
        if rope_type == "default":
            return {}
        fields: dict[str, Any] = {}
        for name in ROPE_TYPES[rope_type]:
            value = values.get(name)
            if value is None:
                if name in ("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"):
                    raise ModelFormatError(f"config: {place} of type {rope_type} lacks {name}")
            elif name == "truncate":
                if not isinstance(value, bool):
                    raise ModelFormatError(
                        f"config: {place}.{name} must be true or false, is {value!r:.80}"
                    )
                fields[name] = value
            elif name in ("short_factor", "long_factor"):
                if not isinstance(value, list):
                    raise ModelFormatError(
                        f"config: {place}.{name} must be a list, is {value!r:.80}"
                    )
                items = cast("list[Any]", value)
                fields[name] = tuple(checked_number(item, name, 1e-6) for item in items)
            else:
                fields[name] = checked_number(value, f"{place}.{name}", 0.0)
        positions = self.integer("max_position_embeddings")
        if rope_type in ("linear", "dynamic") and original is None:
            # What is before scaling is `max_position_embeddings` itself; an outer key belongs to other types.
            original = positions if rope_type == "dynamic" else None
        else:
            original = outer or original or positions
        if original is not None:
            fields["original_max_position_embeddings"] = checked_integer(
                original, "original_max_position_embeddings", 1
            )
        if "factor" not in fields:
            if rope_type not in ("yarn", "longrope"):
                raise ModelFormatError(f"config: {place} of type {rope_type} lacks factor")
            fields["factor"] = positions / fields["original_max_position_embeddings"]
        if fields["factor"] <= 0.0:
            raise ModelFormatError(f"config: {place}.factor must be above 0, is {fields['factor']}")
        return fields

    def unread(self) -> Unread:
        """What nobody asked for, once the spec is made.

        Raises:
            UnsupportedModelError: A key among it changes what the model computes.
        """
        names = {
            name for name in self._data if name not in self._read and self._data[name] is not None
        }
        canonical = {old: new for new, older in SPELLINGS.items() for old in older}
        for name in sorted(names):
            neutral = CHANGES_RESULT.get(canonical.get(name, name))
            if neutral is not None and self._data[name] not in neutral:
                raise UnsupportedModelError(
                    f"config sets {name} = {self._data[name]!r:.80}, which this architecture does not have in kbit"
                )
        known = {
            name
            for name in names
            if canonical.get(name, name) in IRRELEVANT | CHANGES_RESULT.keys()
        }
        return Unread(tuple(sorted(known)), tuple(sorted(names - known)))

    def _required(self, key: str, value: Any) -> Any:
        if value is None:
            raise ModelFormatError(f"config lacks {' or '.join((key, *SPELLINGS.get(key, ())))}")
        return value


@dataclass(frozen=True)
class Unread:
    """Keys of a config that the spec does not depend on."""

    ignored: tuple[str, ...]
    """Known not to change the result."""
    unknown: tuple[str, ...]
    """Unknown to kbit."""


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
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value
        and abs(value) <= 1e30
    ):
        return float(value)
    bound = "" if low == -math.inf else f" of at least {low:g}"
    raise ModelFormatError(f"config: {key} must be a finite number{bound}, is {value!r:.80}")


def decoder(config: Config, *, eps: float, **fields: Any) -> ModelSpec:
    """The spec of a decoder with the usual keys; `fields` replace what an architecture does differently.

    Args:
        config: Hyper-parameters.
        eps: Epsilon of norms where the config gives none.
        **fields: Fields of `ModelSpec`, and `windows`: the sliding window of every layer. `ropes` defaults to one
            rotary embedding that all layers use; `ropes=()` means none.

    Raises:
        ModelFormatError: A value is missing, out of range, or does not fit another.
    """
    heads, head_dim = config.integer("num_attention_heads"), config.head_dim()
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelFormatError(
            f"config: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    count = config.integer("num_hidden_layers")
    ropes = fields.pop("ropes", None)
    if ropes is None:
        ropes = (config.rope(),)
    windows = fields.pop("windows", None) or (None,) * count
    rope = 0 if ropes else None
    if "mlp" not in fields:
        fields["mlp"] = "gated"
    defaults: dict[str, Any] = {
        "layers": tuple(LayerSpec(rope=rope, sliding_window=window) for window in windows),
        "norm": "rms",
        "attention_scale": head_dim**-0.5,
    }
    if "norm_eps" not in fields:
        defaults["norm_eps"] = config.number("norm_eps", eps, 0.0)
    if "hidden_act" not in fields:
        defaults["hidden_act"] = config.activation(default="silu")
    if "intermediate_size" not in fields:
        defaults["intermediate_size"] = config.integer("intermediate_size")
    spec = ModelSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions(config, ropes),
        ropes=ropes,
        **(defaults | fields),
    )
    check_spec(spec)
    return spec


def positions(config: Config, ropes: Sequence[RopeSpec]) -> int:
    """Positions a model accepts: dynamic scaling names the context before scaling, every other type the one after."""
    given = config.integer("max_position_embeddings")
    stretch = [rope.factor for rope in ropes if rope.rope_type == "dynamic" and rope.factor]
    return min(int(given * max([1.0, *stretch])), 2**31 - 1)


def check_spec(spec: ModelSpec) -> None:
    """Bounds on products, which single values cannot have.

    Raises:
        ModelFormatError: A matrix would have more than 2^38 elements.
    """
    widths = {
        "num_attention_heads * head_dim": spec.num_attention_heads * spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
    }
    for name, width in widths.items():
        if width * spec.hidden_size > 2**38:
            raise ModelFormatError(
                f"config: {name} = {width} times hidden_size {spec.hidden_size} is above {2**38}: no such matrix exists"
            )


def with_layers(spec: ModelSpec, **columns: Sequence[Any]) -> ModelSpec:
    """`spec` with fields of its layers replaced, one value a layer."""
    layers = list(spec.layers)
    for name, column in columns.items():
        layers = [
            dataclasses.replace(layer, **{name: value})
            for layer, value in zip(layers, column, strict=True)
        ]
    return dataclasses.replace(spec, layers=tuple(layers))

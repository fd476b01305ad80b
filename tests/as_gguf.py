"""Golden checkpoints as llama.cpp's converter would write them, by the `gguf` package's own name maps."""

from typing import Any

import gguf
import numpy as np

ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi": gguf.MODEL_ARCH.PHI2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    "bloom": gguf.MODEL_ARCH.BLOOM,
    "olmo": gguf.MODEL_ARCH.OLMO,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "stablelm": gguf.MODEL_ARCH.STABLELM,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "exaone4": gguf.MODEL_ARCH.EXAONE4,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "cohere2": gguf.MODEL_ARCH.COHERE2,
    "seed_oss": gguf.MODEL_ARCH.SEED_OSS,
    "ernie4_5": gguf.MODEL_ARCH.ERNIE4_5,
    "arcee": gguf.MODEL_ARCH.ARCEE,
}
INTERLEAVED = {"llama", "mixtral", "olmo", "granite", "smollm3", "arcee"}


def write(path, config, tensors):
    kind = config["model_type"]
    arch = ARCHS[kind]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    add_metadata(writer, kind, config)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    names = gguf.get_tensor_name_map(arch, layers)
    for name, value in converted(kind, config, tensors).items():
        known = (names.get_name(n, (".weight", ".bias")) for n in (name, name.partition(".")[2]))
        new = next(filter(None, known))
        writer.add_tensor(new, np.ascontiguousarray(value, np.float32))
    for name, factors in rope_factors(config).items():
        writer.add_tensor(name, np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def first(config, *keys, default=None) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), default)


def add_metadata(writer, kind, config):
    hidden, heads = (
        first(config, "hidden_size", "n_embd"),
        first(config, "num_attention_heads", "n_head"),
    )
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_context_length(first(config, "max_position_embeddings", "n_positions", default=2048))
    writer.add_embedding_length(hidden)
    writer.add_block_count(first(config, "num_hidden_layers", "n_layer"))
    wide = kind in ("gpt2", "bloom")
    writer.add_feed_forward_length(4 * hidden if wide else config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        keys = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
        writer.add_layer_norm_eps(first(config, *keys, default=1e-5))
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if rope:
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    has_window = kind in ("phi3", "gemma2", "gemma3_text", "gpt_oss", "exaone4", "cohere2")
    if has_window and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if kind in ("mixtral", "qwen3_moe", "gpt_oss"):
        writer.add_expert_count(first(config, "num_local_experts", "num_experts"))
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if kind in ("gpt_neox", "stablelm"):
        writer.add_parallel_residual(config["use_parallel_residual"])
    if kind == "cohere2":
        writer.add_logit_scale(config["logit_scale"])
    if kind == "olmo":
        writer.add_clamp_kqv(config["clip_qkv"])
    if kind == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def rope_factors(config):
    """Divisors of the rotary frequencies, which llama.cpp keeps as tensors."""
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type")
    if kind == "longrope":
        return {f"rope_factors_{x}.weight": rope[f"{x}_factor"] for x in ("long", "short")}
    if kind != "llama3":
        return {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factors = []
    for j in range(head_dim // 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (2 * j / head_dim)
        turns = rope["original_max_position_embeddings"] / wave
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / (smooth + (1.0 - smooth) / rope["factor"]))
    return {"rope_freqs.weight": factors}


def converted(kind, config, tensors):
    heads = first(config, "num_attention_heads", "n_head")
    kv_heads = config.get("num_key_value_heads", heads)
    out = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if kind in INTERLEAVED and module in ("q_proj", "k_proj"):
            value = interleave(value, heads if module == "q_proj" else kv_heads)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if kind == "gpt2" and module in ("c_attn", "c_proj", "c_fc"):
            value = value.T
        if module == "query_key_value":
            by_head = value.reshape(heads, 3, -1, *value.shape[1:])
            value = np.concatenate([by_head[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
        out[name] = value
    if kind == "gpt_oss":
        out = split_gpt_oss(out)
    return stack_experts(out)


def interleave(value, heads):
    halves = value.reshape(heads, 2, -1, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def split_gpt_oss(tensors):
    out = {}
    for name, value in tensors.items():
        if "gate_up_proj" in name:
            suffix = "bias" if name.endswith("_bias") else "weight"
            stem = name.removesuffix("_bias").removesuffix("gate_up_proj")
            for i, part in enumerate(("gate_proj", "up_proj")):
                half = value[..., i::2]
                out[f"{stem}{part}.{suffix}"] = half if suffix == "bias" else half.swapaxes(1, 2)
        elif name.endswith(".sinks"):
            out[f"{name}.weight"] = value
        elif "experts.down_proj" in name:
            is_bias = name.endswith("_bias")
            stem = name.removesuffix("_bias")
            out[f"{stem}.{'bias' if is_bias else 'weight'}"] = (
                value if is_bias else value.swapaxes(1, 2)
            )
        else:
            out[name] = value
    return out


def stack_experts(tensors):
    """`experts.{e}.w1` of all experts as one tensor, by the name that the converter gives it."""
    out, stacks = {}, {}
    for name, value in tensors.items():
        stem, found, rest = name.partition(".experts.")
        index, _, rest = rest.partition(".")
        if found and index.isdecimal():
            stacks.setdefault(f"{stem}.experts.{rest}", {})[int(index)] = value
        else:
            out[name] = value
    for name, parts in stacks.items():
        out[name] = np.stack([parts[e] for e in range(len(parts))])
    return out

"""Makes the golden files: what transformers computes for tiny models, in float32, eager attention.

Run by hand where torch and transformers are (the extra `torch`); tests read only its output:

    python tests/golden/make.py [case ...]

A file holds the config, names and shapes of the tensors (values: golden_weights.py), and for two prompts
of 48 ids: logits, hidden states after the first layer and at the end, attention weights of the
first layer (first prompt), a greedy continuation, and the last logits with matrices in bfloat16. A case named `long_*` holds the last logits
of one sequence that passes the window and the context before scaling.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from golden_weights import weights  # noqa: E402

TOKENS, NEW_TOKENS, TAIL = 48, 24, 16
BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ALL_HEADS = {"num_key_value_heads": None}
OLDER = ALL_HEADS | {
    "intermediate_size": None,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN3_EXPERTS = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LONG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
LONG_FACTORS = {
    "short_factor": [1.0 + 0.05 * j for j in range(16)],
    "long_factor": [1.0 + 0.75 * j for j in range(16)],
}


def rope(kind, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


def long(positions=16384, **fields):
    return {**LONG, "max_position_embeddings": positions, **fields}


SCALED = {
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=8.0),
    "yarn": rope("yarn", factor=8.0, original_max_position_embeddings=2048),
    "llama3": rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=2048,
    ),
    "longrope": rope("longrope", factor=8.0, original_max_position_embeddings=2048, **LONG_FACTORS),
}

CASES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 20}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", QWEN3_EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe_mixed": (
        "qwen3_moe",
        QWEN3_EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "gemma": ("gemma", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {"head_dim": 24, "sliding_window": 16, "query_pre_attn_scalar": 20}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
        | {"tie_word_embeddings": True},
    ),
    "gemma3_text": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 20}
        | {"num_hidden_layers": 3, "tie_word_embeddings": True}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            }
        },
    ),
    "phi": ("phi", {}),
    "phi_qk_norm": ("phi", {"num_hidden_layers": 1, "qk_layernorm": True}),
    "phi3": ("phi3", {"sliding_window": 20, "num_key_value_heads": 2}),
    "gpt2": ("gpt2", OLDER | {"tie_word_embeddings": True}),
    "gpt_neo": (
        "gpt_neo",
        ALL_HEADS
        | {"num_layers": 2, "num_heads": 4, "window_size": 10, "tie_word_embeddings": True}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "gptj": ("gptj", OLDER | {"rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", ALL_HEADS | {"use_parallel_residual": False}),
    "opt": (
        "opt",
        ALL_HEADS | {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True},
    ),
    "bloom": (
        "bloom",
        ALL_HEADS
        | {"n_layer": 2, "n_head": 6, "hidden_size": 96, "intermediate_size": None}
        | {"tie_word_embeddings": True},
    ),
    "olmo": ("olmo", {"clip_qkv": 0.75}),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True}),
    "stablelm_sequential": ("stablelm", {"num_hidden_layers": 1}),
    "starcoder2": ("starcoder2", {"sliding_window": 20, "tie_word_embeddings": True}),
    "granite": (
        "granite",
        {"embedding_multiplier": 6.0, "attention_multiplier": 0.2}
        | {"residual_multiplier": 0.4, "logits_scaling": 3.0, "tie_word_embeddings": True},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "gpt_oss": (
        "gpt_oss",
        EXPERTS
        | {"head_dim": 16, "sliding_window": 12, "intermediate_size": 32}
        | rope("yarn", factor=8.0, original_max_position_embeddings=32, truncate=False),
    ),
    "exaone4": ("exaone4", {"num_hidden_layers": 4, "sliding_window": 12}),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True}),
    "cohere2": (
        "cohere2",
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "logit_scale": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 32,
                },
            },
        },
    ),
    "seed_oss": ("seed_oss", {"head_dim": 24}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16, "use_bias": True, "tie_word_embeddings": True}),
    "arcee": ("arcee", {}),
    "long_default": ("llama", long()),
    "long_linear": ("llama", long(**SCALED["linear"])),
    "long_dynamic": ("llama", long(2048, **SCALED["dynamic"])),
    "long_yarn": ("llama", long(**SCALED["yarn"])),
    "long_llama3": ("llama", long(**SCALED["llama3"])),
    "long_longrope": (
        "phi3",
        long(original_max_position_embeddings=2048, **SCALED["longrope"]),
    ),
    "long_window": ("mistral", long(sliding_window=300)),
}


def inputs(seed, count, length, vocab):
    raw = np.random.Philox(key=seed).random_raw(count * length)
    return (raw % np.uint64(vocab - 3) + np.uint64(3)).astype(np.int64).reshape(count, length)


def build(folder, model_type, fields, seed):
    """The model with the formula's weights, by way of a checkpoint as people have it."""
    fields = {key: value for key, value in {**BASE, **fields}.items() if value is not None}
    config = transformers.AutoConfig.for_model(model_type, **fields)
    made = transformers.AutoModelForCausalLM.from_config(config)
    made.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    save_file(weights(shapes, seed), folder / "model.safetensors", {"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise SystemExit(f"{model_type}: {report}")
    return model.eval(), shapes, (folder / "config.json").read_text()


def outputs(model, ids):
    with torch.no_grad():
        out = model(torch.tensor(ids), output_hidden_states=True, output_attentions=True)
        greedy, gap = torch.tensor(ids), np.inf
        for _ in range(NEW_TOKENS):
            top = model(greedy).logits[:, -1].topk(2)
            gap = min(gap, float((top.values[:, 0] - top.values[:, 1]).min()))
            greedy = torch.cat([greedy, top.indices[:, :1]], dim=1)
    logits = out.logits.numpy()
    # A continuation that hangs on rounding proves nothing.
    if gap < 2e-3 * logits.std():
        return None
    return {
        "logits": logits,
        "hidden_1": out.hidden_states[1][0].numpy(),
        "hidden_last": out.hidden_states[-1][0].numpy(),
        "attention_0": out.attentions[0][0].numpy(),
        "greedy": greedy.numpy().astype(np.int32),
    }


def bf16_logits(model, ids):
    """The last logits when the matrices of products and of tokens are rounded to bfloat16."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 and not any(word in name for word in ("bias", "wpe", "position")):
                value.copy_(value.bfloat16().float())
        return model(torch.tensor(ids), logits_to_keep=TAIL).logits.numpy()


def make(case):
    model_type, fields = CASES[case]
    is_long = case.startswith("long_")
    for seed in range(1, 50):
        with tempfile.TemporaryDirectory() as folder:
            model, shapes, config = build(Path(folder), model_type, fields, seed)
        vocab = model.config.vocab_size
        ids = inputs(seed, 1, 8192 + TAIL, vocab) if is_long else inputs(seed, 2, TOKENS, vocab)
        if is_long:
            with torch.no_grad():
                logits = model(torch.tensor(ids), logits_to_keep=TAIL).logits[0].numpy()
            tensors = {"logits": logits}
        else:
            tensors = outputs(model, ids)
        if tensors is not None:
            if not is_long:
                tensors["bf16_logits"] = bf16_logits(model, ids)
            break
    else:
        raise SystemExit(f"{case}: no seed without near-ties")
    tensors["input_ids"] = ids.astype(np.int32)
    metadata = {
        "config": json.dumps(json.loads(config)),
        "tensors": json.dumps(shapes),
        "seed": str(seed),
        "made_by": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    path = HERE / f"{case}.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    print(
        f"{case}: seed {seed}, {path.stat().st_size} bytes, logits std {tensors['logits'].std():.3f}"
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        make(name)

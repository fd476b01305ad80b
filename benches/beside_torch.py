"""One measurement of PyTorch in bfloat16, in a process of its own; `compare.py` starts it.

    python benches/beside_torch.py FOLDER THREADS PROMPTS

Runs a Llama model (`shapes.py`) with the functions PyTorch has for its parts, in the way its users write them: no
framework around it that could cost time. Prints one line of JSON: tokens/s of the best of so many prompts of 512,
and of decode.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as f
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]
Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (heads, positions, head_dim)."""


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (heads, positions, head_dim), halves apart."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def last_logits(
    w: Weights, config: dict[str, Any], cache: Cache, ids: torch.Tensor
) -> torch.Tensor:
    """Logits (vocab,) behind `ids` (positions,), whose keys and values are added to those of the cache."""
    heads, kv, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    powers = torch.arange(0, dim, 2) / dim
    before = cache[0][0].shape[1] if cache else 0
    positions = torch.arange(before, before + len(ids))
    angles = torch.outer(positions, config["rope_theta"] ** -powers).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    x = f.embedding(ids, w["model.embed_tokens.weight"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return f.rms_norm(x, x.shape[-1:], w[name + ".weight"], config["rms_norm_eps"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return f.linear(x, w[name + ".weight"])

    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (
            linear(h, f"{at}self_attn.{name}_proj").view(len(ids), n, dim).transpose(0, 1)
            for name, n in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if i < len(cache):
            k, v = (torch.cat(pair, 1) for pair in zip(cache[i], (k, v), strict=True))
            cache[i] = k, v
        else:
            cache.append((k, v))
        a = f.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=len(ids) > 1, enable_gqa=True
        )
        x = x + linear(a[0].transpose(0, 1).flatten(1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        gate = f.silu(linear(h, at + "mlp.gate_proj"))
        x = x + linear(gate * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    last = norm(x[-1], "model.norm")
    return f.linear(last, w.get("lm_head.weight", w["model.embed_tokens.weight"]))


def main() -> None:
    """Run it."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    w: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        w |= load_file(file)
    config = json.loads((folder / "config.json").read_text())
    rng = torch.Generator().manual_seed(1)
    rates = []
    with torch.inference_mode():
        for _ in range(1 + int(sys.argv[3])):
            ids = torch.randint(300, 2000, (512,), generator=rng)
            start = time.perf_counter()
            logits = last_logits(w, config, [], ids)
            rates.append(512 / (time.perf_counter() - start))
            assert logits.isfinite().all(), "logits are not finite"
        cache: Cache = []
        token = last_logits(w, config, cache, ids[:8]).argmax()[None]
        start = time.perf_counter()
        for _ in range(128):
            token = last_logits(w, config, cache, token).argmax()[None]
        decode = 128 / (time.perf_counter() - start)
    print(json.dumps({"prefill": max(rates[1:]), "decode": decode}))


if __name__ == "__main__":
    main()

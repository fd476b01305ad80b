"""A decoder by its `ModelSpec` in plain NumPy: slow and obvious, written from docs/, not from rust/.

It works in float64 (or what `dtype` says) on whole sequences, without a cache, and is what every
architecture's data is checked with before any engine runs.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Output:
    logits: np.ndarray  # (tokens, vocab)
    hidden_states: list[np.ndarray]  # embedding, after each layer, the last normed
    attentions: list[np.ndarray]  # (heads, tokens, tokens) of each layer


class ReferenceDecoder:
    def __init__(self, spec, weights, *, dtype=np.float64, context=None):
        self.spec = spec
        self.weights = {name: np.asarray(value, dtype) for name, value in weights.items()}
        self.dtype = dtype
        self.context = context or spec.max_position_embeddings

    def forward(self, ids):
        spec, n = self.spec, len(ids)
        x = self.weights["embed.weight"][ids] * self.dtype(np.float32(spec.embed_scale))
        if "embed.positions.weight" in self.weights:
            x = x + self.weights["embed.positions.weight"][np.arange(n) + spec.position_offset]
        if "embed.norm.weight" in self.weights:
            x = self.norm(x, "embed.norm")
        hidden, attentions = [x], []
        for i, layer in enumerate(spec.layers):
            x, probabilities = self.block(x, f"layers.{i}", layer)
            attentions.append(probabilities)
            hidden.append(x)
        x = self.place_norm(x, "final_norm")
        hidden[-1] = x
        head = "head" if "head.weight" in self.weights else "embed"
        logits = self.linear(x, head) * spec.logit_scale
        if spec.final_logit_softcapping:
            logits = soft_cap(logits, spec.final_logit_softcapping)
        return Output(logits, hidden, attentions)

    def greedy(self, ids, count):
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.forward(np.array(ids)).logits[-1].argmax()))
        return ids

    def block(self, x, name, layer):
        normed = self.place_norm(x, f"{name}.attn.in_norm")
        mixed, probabilities = self.attention(normed, f"{name}.attn", layer)
        mixed = self.out_norm(mixed, f"{name}.attn.out_norm") * self.spec.residual_scale
        if self.spec.parallel_residual:
            own = f"{name}.mlp.in_norm.weight" in self.weights
            mlp_in = self.place_norm(x, f"{name}.mlp.in_norm") if own else normed
        else:
            x = x + mixed
            mlp_in = self.place_norm(x, f"{name}.mlp.in_norm")
        mlp = self.experts(mlp_in, name) if layer.experts else self.mlp(mlp_in, f"{name}.mlp")
        mlp = self.out_norm(mlp, f"{name}.mlp.out_norm") * self.spec.residual_scale
        return (x + mixed + mlp if self.spec.parallel_residual else x + mlp), probabilities

    def attention(self, x, name, layer):
        spec, n = self.spec, len(x)
        heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        q, k, v = (self.linear(x, f"{name}.{part}") for part in "qkv")
        if spec.clip_qkv is not None:
            q, k, v = (np.clip(part, -spec.clip_qkv, spec.clip_qkv) for part in (q, k, v))
        q, k = self.head_norm(q, f"{name}.q_norm"), self.head_norm(k, f"{name}.k_norm")
        q, k, v = q.reshape(n, heads, dim), k.reshape(n, kv_heads, dim), v.reshape(n, kv_heads, dim)
        if layer.rope is not None:
            cos, sin = self.rope(spec.ropes[layer.rope], n)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = heads // kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        sinks = self.weights.get(f"{name}.sinks")
        # A few hundred queries at a time: a long sequence's whole square would fill the memory.
        out, kept = np.empty_like(q), []
        for start in range(0, n, 512):
            rows, past = slice(start, start + 512), slice(0, start + 512)
            weights = self.probabilities(q[rows], k[past], start, layer, sinks)
            out[rows] = np.einsum("hqk,khd->qhd", weights, v[past])
            kept.append(weights if n <= 512 else weights[:, :0, :0])
        return self.linear(out.reshape(n, heads * dim), f"{name}.o"), np.concatenate(kept, axis=1)

    def probabilities(self, q, k, start, layer, sinks):
        """(heads, queries, keys) of queries that begin at position `start`."""
        spec = self.spec
        scores = np.einsum("qhd,khd->hqk", q, k) * spec.attention_scale
        if spec.attn_logit_softcapping:
            scores = soft_cap(scores, spec.attn_logit_softcapping)
        distance = start + np.arange(len(q))[:, None] - np.arange(len(k))[None, :]
        if spec.alibi:
            scores = scores - alibi_slopes(spec.num_attention_heads)[:, None, None] * distance
        seen = distance >= 0
        if layer.sliding_window is not None:
            seen &= distance < layer.sliding_window
        scores = np.where(seen, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            top = np.maximum(top, sinks[:, None, None])
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks[:, None, None] - top)
        return weights / total

    def mlp(self, x, name):
        spec = self.spec
        up = self.linear(x, f"{name}.up")
        if spec.mlp == "plain":
            inner = activate(up, spec.hidden_act)
        elif spec.mlp == "gated":
            inner = activate(self.linear(x, f"{name}.gate"), spec.hidden_act) * up
        else:
            gate = np.minimum(self.linear(x, f"{name}.gate"), spec.mlp_limit)
            up = np.clip(up, -spec.mlp_limit, spec.mlp_limit)
            inner = gate * sigmoid(spec.mlp_alpha * gate) * (up + 1)
        return self.linear(inner, f"{name}.down")

    def experts(self, x, name):
        moe, out = self.spec.moe, np.zeros_like(x)
        scores = self.linear(x, f"{name}.mlp.router")
        for t, row in enumerate(scores):
            chosen = np.argsort(-row, kind="stable")[: moe.num_experts_per_tok]
            if moe.routing == "topk_softmax":
                shares = softmax(row[chosen])
            else:
                shares = softmax(row)[chosen]
                if moe.routing == "softmax_topk_renormalise":
                    shares = shares / shares.sum()
            for e, share in zip(chosen, shares, strict=True):
                out[t] += share * self.mlp(x[t : t + 1], f"{name}.mlp.experts.{e}")[0]
        return out

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def place_norm(self, x, name):
        """The norm of a place that a layer-norm model always has, with parameters or without."""
        has = f"{name}.weight" in self.weights
        return self.norm(x, name) if has or self.spec.norm == "layer" else x

    def out_norm(self, x, name):
        return self.norm(x, name) if f"{name}.weight" in self.weights else x

    def head_norm(self, x, name):
        """Per head, or over the whole width: told by the weight's length."""
        weight = self.weights.get(f"{name}.weight")
        if weight is None:
            return x
        return self.norm(x.reshape(len(x), -1, len(weight)), name).reshape(x.shape)

    def norm(self, x, name):
        if self.spec.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.spec.norm_eps)
        return x * self.weights.get(f"{name}.weight", 1.0) + self.weights.get(f"{name}.bias", 0.0)

    def rope(self, rope, n):
        """Cosines and sines, (tokens, pairs), of a sequence of n positions."""
        inverse, factor = frequencies(rope, n, self.context)
        # Angles are f32 products: far out, that is what checkpoints were trained with.
        positions = np.arange(n, dtype=np.float32)
        angles = (positions[:, None] * inverse.astype(np.float32)).astype(self.dtype)
        return np.cos(angles) * factor, np.sin(angles) * factor


def frequencies(rope, n, context):
    """Inverse frequencies of the pairs and the factor of cosine and sine."""
    dim, theta, factor = rope.rotary_dim, rope.rope_theta, rope.factor
    original = rope.original_max_position_embeddings
    exponents = np.arange(0, dim, 2) / dim
    plain = 1.0 / theta**exponents
    match rope.rope_type:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / factor, 1.0
        case "dynamic":
            if n <= original:
                return plain, 1.0
            stretched = theta * (factor * context / original - (factor - 1)) ** (dim / (dim - 2))
            return 1.0 / stretched**exponents, 1.0
        case "llama3":
            turns = original * plain / (2 * np.pi)  # in the original context
            low, high = rope.low_freq_factor, rope.high_freq_factor
            smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return plain * (smooth + (1 - smooth) / factor), 1.0
        case "yarn":
            return yarn(rope, plain)
        case "longrope":
            divisors = rope.long_factor if n > original else rope.short_factor
            scale = rope.attention_factor
            if scale is None:
                scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return plain / np.array(divisors), scale
    raise AssertionError(rope.rope_type)


def yarn(rope, plain):
    dim, original = rope.rotary_dim, rope.original_max_position_embeddings

    def pair_with(turns):
        """The (fractional) pair that turns so often in the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_with(rope.beta_fast or 32.0), pair_with(rope.beta_slow or 1.0)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    mixed = plain / rope.factor * ramp + plain * (1 - ramp)
    if rope.attention_factor is not None:
        return mixed, rope.attention_factor

    def mscale(weight):
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mixed, mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mixed, mscale(1.0)


def rotate(x, cos, sin):
    """Pairs (j, j + half) of the first 2 * half elements of every head; x (tokens, heads, dim)."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def alibi_slopes(heads):
    """Geometric slopes; for other counts than powers of two, every other of the next one follow."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(heads - power)]
    return np.array(slopes)


def soft_cap(x, cap):
    return cap * np.tanh(x / cap)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def activate(x, name):
    match name:
        case "silu":
            return x * sigmoid(x)
        case "gelu":
            return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
        case "gelu_tanh":
            return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
        case "quick_gelu":
            return x * sigmoid(1.702 * x)
        case "relu":
            return np.maximum(x, 0.0)
        case "relu2":
            return np.maximum(x, 0.0) ** 2
        case "identity":
            return x
    raise AssertionError(name)


def transformed(array, transforms):
    """What `load_weight` does to a tensor, by the words of its documentation."""
    for name, *arguments in transforms:
        match name:
            case "rows":
                array = array[arguments[0] : arguments[1]]
            case "transpose":
                array = array.T
            case "add":
                array = array + np.float32(arguments[0])
            case "scale":
                array = array * np.float32(arguments[0])
            case "select":
                array = np.take(array, arguments[0], axis=(*arguments[1:], 0)[0])
            case "reshape":
                array = array.reshape(arguments)
            case "permute_rope":
                heads, dim = arguments
                array = array.reshape(heads, -1, *array.shape[1:])
                pairs = array[:, :dim]
                array = np.concatenate([pairs[:, 0::2], pairs[:, 1::2], array[:, dim:]], axis=1)
                array = array.reshape(-1, *array.shape[2:])
            case _:
                raise AssertionError(name)
    return array

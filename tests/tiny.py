"""Tiny Llama checkpoints with random weights, written without kbit: Hugging Face directories and GGUF files."""

import json

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "vocab_size": 260,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def weights(*, tied=False, seed=0):
    """Hugging Face names to float32 arrays; multiples of 2^-8, so that f16 and bf16 hold them exactly."""
    rng = np.random.default_rng(seed)
    c = CONFIG
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]

    def matrix(rows, columns):
        return (rng.integers(-127, 128, (rows, columns)) / 1024).astype(np.float32)

    def norm():
        return (1 + rng.integers(-63, 64, hidden) / 128).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden) * 4, "model.norm.weight": norm()}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        tensors |= {
            at + "input_layernorm.weight": norm(),
            at + "post_attention_layernorm.weight": norm(),
            at + "self_attn.q_proj.weight": matrix(q, hidden),
            at + "self_attn.k_proj.weight": matrix(kv, hidden),
            at + "self_attn.v_proj.weight": matrix(kv, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, q),
            at + "mlp.gate_proj.weight": matrix(inner, hidden),
            at + "mlp.up_proj.weight": matrix(inner, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    return tensors


NAMES = {"int32": "I32", "float16": "F16", "float32": "F32", "uint8": "F8_E4M3", "int8": "I8"}
"""Of NumPy's dtypes in the container; a uint8 stands for the bits of an fp8."""


def encode(array, dtype):
    """Bytes of a float32 array whose values `dtype` holds exactly."""
    if dtype == "BF16":
        return (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return array.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def write_safetensors(path, tensors, dtype="F32", metadata=None):
    """The container by its specification."""
    header = {"__metadata__": metadata} if metadata else {}
    blobs, at = [], 0
    for name, array in tensors.items():
        own = array.dtype != np.float32
        blob = array.tobytes() if own else encode(array, dtype)
        header[name] = {
            "dtype": NAMES[array.dtype.name] if own else dtype,
            "shape": list(array.shape),
            "data_offsets": [at, at + len(blob)],
        }
        blobs.append(blob)
        at += len(blob)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(blobs))


def tokenizer():
    """Every byte is a token; two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return core


def make(
    directory, *, dtype="BF16", tied=False, shards=1, text=True, config=None, change=None, **files
):
    """A Hugging Face directory.

    Args:
        change: Called with the tensors before they are written.
        files: JSON files to add, by stem.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = weights(tied=tied)
    if change:
        change(tensors)
    described = CONFIG | {"tie_word_embeddings": tied} | (config or {})
    (directory / "config.json").write_text(json.dumps(described))
    for stem, value in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(value))
    if text:
        tokenizer().save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
        return directory
    names = list(tensors)
    table = {}
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[s::shards]}
        write_safetensors(directory / file, part, dtype)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": table}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def make_gguf(path, kind="F32"):
    """The same weights under llama.cpp's names, q and k in its order."""
    c = CONFIG
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c["vocab_size"])
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<unused0>", "<unused1>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 4)
    writer.add_token_merges([])
    writer.add_eos_token_id(c["eos_token_id"])
    writer.add_add_bos_token(False)
    ends = {"embed_tokens": "token_embd", "norm": "output_norm"}
    inside = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, array in weights().items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        if stem == "lm_head":
            new = "output"
        elif stem in ends:
            new = ends[stem]
        else:
            _, i, rest = stem.split(".", 2)
            new = f"blk.{i}.{inside[rest]}"
            if rest in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = array.shape[0] // c["head_dim"]
                halves = array.reshape(heads, 2, c["head_dim"] // 2, -1)
                array = halves.swapaxes(1, 2).reshape(array.shape)
        if kind == "F32" or array.ndim == 1:
            writer.add_tensor(f"{new}.weight", np.ascontiguousarray(array))
        elif kind == "F16":
            writer.add_tensor(f"{new}.weight", np.ascontiguousarray(array.astype(np.float16)))
        else:
            raw = gguf.GGMLQuantizationType[kind]
            packed = gguf.quants.quantize(np.ascontiguousarray(array), raw)
            writer.add_tensor(f"{new}.weight", packed, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

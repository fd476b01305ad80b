"""Random-weight models of real shapes, as a Hugging Face directory and as GGUF, for benchmarks.

Weights are drawn from one seeded generator, so both files hold the same values (bfloat16, exact in both).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPECIAL = 3 + 256  # <unk> <s> </s> and one token a byte


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-architecture decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    def config(self) -> dict[str, object]:
        """config.json in the older spelling, which every peer reads."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "tie_word_embeddings": self.tied, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
            "attention_bias": False, "mlp_bias": False,
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(Hugging Face name, GGUF name, shape) of every tensor, in file order."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", "token_embd.weight", (self.vocab, self.hidden)
        for i in range(self.layers):
            hf, gg = f"model.layers.{i}.", f"blk.{i}."
            yield hf + "input_layernorm.weight", gg + "attn_norm.weight", (self.hidden,)
            yield hf + "self_attn.q_proj.weight", gg + "attn_q.weight", (q, self.hidden)
            yield hf + "self_attn.k_proj.weight", gg + "attn_k.weight", (kv, self.hidden)
            yield hf + "self_attn.v_proj.weight", gg + "attn_v.weight", (kv, self.hidden)
            yield hf + "self_attn.o_proj.weight", gg + "attn_output.weight", (self.hidden, q)
            yield hf + "post_attention_layernorm.weight", gg + "ffn_norm.weight", (self.hidden,)
            yield (
                hf + "mlp.gate_proj.weight",
                gg + "ffn_gate.weight",
                (self.intermediate, self.hidden),
            )
            yield hf + "mlp.up_proj.weight", gg + "ffn_up.weight", (self.intermediate, self.hidden)
            yield (
                hf + "mlp.down_proj.weight",
                gg + "ffn_down.weight",
                (self.hidden, self.intermediate),
            )
        yield "model.norm.weight", "output_norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", "output.weight", (self.vocab, self.hidden)

    def operations(self) -> int:
        """Multiplications and additions of matrices for one token of a prompt, which needs no output head."""
        layers = (
            dims
            for name, _, dims in self.tensors()
            if name.startswith("model.layers.") and len(dims) == 2
        )
        return 2 * sum(rows * columns for rows, columns in layers)

    def kv_bytes(self) -> int:
        """Keys and values of one position in 16-bit floats."""
        return 4 * self.layers * self.kv_heads * self.head_dim


SHAPES = {
    "1B": Shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "0.5B": Shape(896, 4864, 24, 14, 2, 64, 151936, tied=True),
    "8B": Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "tiny": Shape(256, 768, 4, 8, 4, 32, 2048, tied=True),
}


def _values(index: int, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """bfloat16 bit patterns of tensor `index`: N(0, 0.02) for matrices, near one for norms."""
    rng = np.random.default_rng([2026, index])
    x = rng.standard_normal(shape, dtype=np.float32)
    x = 1 + np.float32(0.1) * x if len(shape) == 1 else np.float32(0.02) * x
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def tokens(vocab: int) -> list[str]:
    """A SentencePiece-style vocabulary: specials, bytes, then made-up words."""
    return [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *(f"▁w{i}" for i in range(vocab - SPECIAL)),
    ]


def write_tokenizer(vocab: int, to: Path) -> None:
    """Write a byte-level BPE tokenizer.json of `vocab` entries, as slow to read as those of real models."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>"]
    words, merges = list("abcdefghijklmnopqrstuvwxyz"), []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    for word in words:  # which grows while it is read: ever longer words
        for letter in "abcdefghijklmnopqrstuvwxyz":
            if len(merges) < vocab - len(special) - len(alphabet):
                merges.append((word, letter))
                words.append(word + letter)
        if len(merges) == vocab - len(special) - len(alphabet):
            break
    entries = [*special, *sorted(alphabet), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(to))


def write_directory(shape: Shape, to: Path) -> Path:
    """Write a Hugging Face directory (bfloat16 shards of up to four layers), once."""
    if (to / "done").exists():
        return to
    from safetensors import TensorSpec, serialize_file

    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_text(json.dumps(shape.config(), indent=1))
    write_tokenizer(shape.vocab, to / "tokenizer.json")
    listed, shard, size, weight_map = list(shape.tensors()), {}, 0, {}
    for index, (name, _, dims) in enumerate(listed):
        shard[name] = _values(index, dims)
        size += shard[name].nbytes
        if size > 500 << 20 or index == len(listed) - 1:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            specs = {
                k: TensorSpec(
                    dtype="bfloat16", shape=v.shape, data_ptr=v.ctypes.data, data_len=v.nbytes
                )
                for k, v in shard.items()
            }
            serialize_file(specs, str(to / file), None)
            weight_map |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    (to / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (to / "done").touch()
    return to


def write_gguf(shape: Shape, to: Path) -> Path:
    """Write the same model as a bfloat16 GGUF file, once."""
    if to.exists():
        return to
    import gguf

    part = to.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens(shape.vocab))
    writer.add_token_scores([-float(i) for i in range(shape.vocab)])
    kinds = [2, 3, 3] + [6] * 256  # unknown, control, control, bytes; the rest normal
    writer.add_token_types(kinds + [1] * (shape.vocab - SPECIAL))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    listed = list(shape.tensors())
    for _, name, dims in listed:
        kind, itemsize = (
            (gguf.GGMLQuantizationType.F32, 4)
            if len(dims) == 1
            else (gguf.GGMLQuantizationType.BF16, 2)
        )
        # the writer takes the shape in bytes of a row for raw types
        raw = dims if len(dims) == 1 else (dims[0], dims[1] * itemsize)
        dtype = np.dtype(np.float32 if len(dims) == 1 else np.uint8)
        writer.add_tensor_info(name, raw, dtype, int(np.prod(dims)) * itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, (_, _, dims) in enumerate(listed):
        bits = _values(index, dims)
        if len(dims) == 1:
            writer.write_tensor_data((bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.write_tensor_data(bits.view(np.uint8))
    writer.close()
    part.rename(to)
    return to


if __name__ == "__main__":  # python shapes.py SHAPE FOLDER
    _shape, _folder = SHAPES[sys.argv[1]], Path(sys.argv[2])
    write_directory(_shape, _folder / sys.argv[1])
    write_gguf(_shape, _folder / f"{sys.argv[1]}-bf16.gguf")

"""BLOOM: ALiBi for positions, a norm of the embedding, q, k, v fused by head."""

from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, fused_heads, fused_qkv
from kbit.spec import ModelSpec

ARCHITECTURES = ("BloomForCausalLM",)
GGUF = Gguf("bloom", names={"blk.{i}.attn_qkv": fused_qkv("layers.{i}.attn")})
NAMES = NameMap(
    {
        "word_embeddings": "embed",
        "word_embeddings_layernorm": "embed.norm",
        "h.{i}.input_layernorm": "layers.{i}.attn.in_norm",
        "h.{i}.self_attention.query_key_value": fused_heads("layers.{i}.attn"),
        "h.{i}.self_attention.dense": "layers.{i}.attn.o",
        "h.{i}.post_attention_layernorm": "layers.{i}.mlp.in_norm",
        "h.{i}.mlp.dense_h_to_4h": "layers.{i}.mlp.up",
        "h.{i}.mlp.dense_4h_to_h": "layers.{i}.mlp.down",
        "ln_f": "final_norm",
        "lm_head": "head",
    },
    prefixes=("transformer.",),
)


def spec(config: Config) -> ModelSpec:
    """ALiBi has no last position; `seq_length` is the context of training."""
    return decoder(
        config,
        eps=1e-5,
        norm="layer",
        hidden_act="gelu_tanh",
        mlp="plain",
        intermediate_size=config.integer("intermediate_size", 4 * config.integer("hidden_size")),
        max_position_embeddings=config.integer(
            "max_position_embeddings", config.integer("seq_length", 2048)
        ),
        ropes=(),
        alibi=True,
    )

"""GPT-NeoX: parallel blocks with a norm each, partly rotated heads, q, k, v fused by head."""

from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, fused_heads, fused_qkv
from kbit.spec import ModelSpec

ARCHITECTURES = ("GPTNeoXForCausalLM",)
GGUF = Gguf("gptneox", names={"blk.{i}.attn_qkv": fused_qkv("layers.{i}.attn")})
NAMES = NameMap(
    {
        "embed_in": "embed",
        "layers.{i}.input_layernorm": "layers.{i}.attn.in_norm",
        "layers.{i}.attention.query_key_value": fused_heads("layers.{i}.attn"),
        "layers.{i}.attention.dense": "layers.{i}.attn.o",
        "layers.{i}.post_attention_layernorm": "layers.{i}.mlp.in_norm",
        "layers.{i}.mlp.dense_h_to_4h": "layers.{i}.mlp.up",
        "layers.{i}.mlp.dense_4h_to_h": "layers.{i}.mlp.down",
        "final_layer_norm": "final_norm",
        "embed_out": "head",
    },
    prefixes=("gpt_neox.",),
    ignored=(
        "layers.{i}.attention.bias",
        "layers.{i}.attention.masked_bias",
        "layers.{i}.attention.rotary_emb.inv_freq",
    ),
)


def spec(config: Config) -> ModelSpec:
    """A quarter of a head is rotated where the config does not say how much."""
    return decoder(
        config,
        eps=1e-5,
        norm="layer",
        hidden_act=config.activation(default="gelu"),
        mlp="plain",
        parallel_residual=config.flag("use_parallel_residual", True),
        ropes=(config.rope(fraction=0.25),),
    )

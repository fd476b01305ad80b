"""GPT-2: learned positions, layer norms, a plain GELU MLP, weights stored (in, out)."""

from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, fused_qkv, to, transpose
from kbit.spec import ModelSpec

ARCHITECTURES = ("GPT2LMHeadModel",)
GGUF = Gguf("gpt2", names={"blk.{i}.attn_qkv": fused_qkv("layers.{i}.attn")})
NAMES = NameMap(
    {
        "wte": "embed",
        "wpe": "embed.positions",
        "h.{i}.ln_1": "layers.{i}.attn.in_norm",
        "h.{i}.attn.c_attn": fused_qkv("layers.{i}.attn", transpose),
        "h.{i}.attn.c_proj": to("layers.{i}.attn.o", transpose),
        "h.{i}.ln_2": "layers.{i}.mlp.in_norm",
        "h.{i}.mlp.c_fc": to("layers.{i}.mlp.up", transpose),
        "h.{i}.mlp.c_proj": to("layers.{i}.mlp.down", transpose),
        "ln_f": "final_norm",
        "lm_head": "head",
    },
    prefixes=("transformer.",),
    ignored=("h.{i}.attn.bias", "h.{i}.attn.masked_bias"),
)


def spec(config: Config) -> ModelSpec:
    """The MLP is four times as wide as the model unless `n_inner` says otherwise."""
    scaled = config.flag("scale_attn_weights", True)
    return decoder(
        config,
        eps=1e-5,
        norm="layer",
        hidden_act=config.activation(default="gelu_new"),
        mlp="plain",
        intermediate_size=config.integer("intermediate_size", 4 * config.integer("hidden_size")),
        ropes=(),
        attention_scale=config.head_dim() ** -0.5 if scaled else 1.0,
    )

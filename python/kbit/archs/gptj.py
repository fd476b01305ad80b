"""GPT-J: parallel attention and MLP under one layer norm, rotated pairs side by side."""

from kbit.archs._decoder import decoder
from kbit.config import Config
from kbit.names import NameMap, rope_halves, to
from kbit.spec import ModelSpec

ARCHITECTURES = ("GPTJForCausalLM",)
NAMES = NameMap(
    {
        "wte": "embed",
        "h.{i}.ln_1": "layers.{i}.attn.in_norm",
        "h.{i}.attn.q_proj": to("layers.{i}.attn.q", rope_halves),
        "h.{i}.attn.k_proj": to("layers.{i}.attn.k", rope_halves),
        "h.{i}.attn.v_proj": "layers.{i}.attn.v",
        "h.{i}.attn.out_proj": "layers.{i}.attn.o",
        "h.{i}.mlp.fc_in": "layers.{i}.mlp.up",
        "h.{i}.mlp.fc_out": "layers.{i}.mlp.down",
        "ln_f": "final_norm",
        "lm_head": "head",
    },
    prefixes=("transformer.",),
    ignored=("h.{i}.attn.bias", "h.{i}.attn.masked_bias"),
)


def spec(config: Config) -> ModelSpec:
    """The first `rotary_dim` elements of a head are rotated."""
    config.default(rotary_dim=64)
    return decoder(
        config,
        eps=1e-5,
        norm="layer",
        hidden_act=config.activation(default="gelu_new"),
        mlp="plain",
        intermediate_size=config.integer("intermediate_size", 4 * config.integer("hidden_size")),
        parallel_residual=True,
        ropes=(config.rope(),),
    )

"""OPT: GPT-2's shape with ReLU, positions counted from two, weights stored (out, in)."""

from kbit.archs._decoder import decoder
from kbit.config import Config
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("OPTForCausalLM",)
NAMES = NameMap(
    {
        "embed_tokens": "embed",
        "embed_positions": "embed.positions",
        "layers.{i}.self_attn_layer_norm": "layers.{i}.attn.in_norm",
        "layers.{i}.self_attn.q_proj": "layers.{i}.attn.q",
        "layers.{i}.self_attn.k_proj": "layers.{i}.attn.k",
        "layers.{i}.self_attn.v_proj": "layers.{i}.attn.v",
        "layers.{i}.self_attn.out_proj": "layers.{i}.attn.o",
        "layers.{i}.final_layer_norm": "layers.{i}.mlp.in_norm",
        "layers.{i}.fc1": "layers.{i}.mlp.up",
        "layers.{i}.fc2": "layers.{i}.mlp.down",
        "final_layer_norm": "final_norm",
        "lm_head": "head",
    },
    prefixes=("model.decoder.", "decoder."),
    optional=("layers.{i}.attn.in_norm", "layers.{i}.mlp.in_norm", "final_norm"),
)


def spec(config: Config) -> ModelSpec:
    """The 350M model, whose norms come after the sum and whose embedding is narrow, is refused."""
    config.only("do_layer_norm_before", True)
    config.only("word_embed_proj_dim", config.integer("hidden_size"))
    return decoder(
        config,
        eps=1e-5,
        norm="layer",
        hidden_act=config.activation(default="relu"),
        mlp="plain",
        ropes=(),
        position_offset=2,
    )

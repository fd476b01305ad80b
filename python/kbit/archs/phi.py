"""Phi 1 to 2: parallel attention and MLP under one layer norm, partly rotated heads, biases."""

from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("PhiForCausalLM",)
GGUF = Gguf("phi2")
NAMES = NameMap(
    {
        "embed_tokens": "embed",
        "layers.{i}.input_layernorm": "layers.{i}.attn.in_norm",
        "layers.{i}.self_attn.q_proj": "layers.{i}.attn.q",
        "layers.{i}.self_attn.k_proj": "layers.{i}.attn.k",
        "layers.{i}.self_attn.v_proj": "layers.{i}.attn.v",
        "layers.{i}.self_attn.dense": "layers.{i}.attn.o",
        "layers.{i}.self_attn.q_layernorm": "layers.{i}.attn.q_norm",
        "layers.{i}.self_attn.k_layernorm": "layers.{i}.attn.k_norm",
        "layers.{i}.mlp.fc1": "layers.{i}.mlp.up",
        "layers.{i}.mlp.fc2": "layers.{i}.mlp.down",
        "final_layernorm": "final_norm",
        "lm_head": "head",
    },
    prefixes=("model.",),
    ignored=("layers.{i}.self_attn.rotary_emb.inv_freq",),
    optional=("layers.{i}.attn.q_norm", "layers.{i}.attn.k_norm"),
)


def spec(config: Config) -> ModelSpec:
    """Half of a head is rotated where the config does not say how much."""
    config.flag("qk_layernorm", False)  # told by the tensors
    return decoder(
        config,
        eps=1e-5,
        norm="layer",
        hidden_act=config.activation(default="gelu_new"),
        mlp="plain",
        parallel_residual=True,
        ropes=(config.rope(fraction=0.5),),
    )

"""GLM 4: norms on both sides of a block, fused gate and up, half a head rotated side by side."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, fused_gate_up, rope_halves, to
from kbit.spec import ModelSpec

ARCHITECTURES = ("Glm4ForCausalLM",)
FUSED = fused_gate_up("layers.{i}.mlp")
GGUF = Gguf("glm4", interleaved=True, names={"blk.{i}.ffn_up": FUSED})
NAMES = NameMap(
    {
        **llama.ENDS,
        **llama.NORMS,
        **llama.ATTENTION,
        "layers.{i}.self_attn.q_proj": to("layers.{i}.attn.q", rope_halves),
        "layers.{i}.self_attn.k_proj": to("layers.{i}.attn.k", rope_halves),
        "layers.{i}.post_self_attn_layernorm": "layers.{i}.attn.out_norm",
        "layers.{i}.post_mlp_layernorm": "layers.{i}.mlp.out_norm",
        "layers.{i}.mlp.gate_up_proj": FUSED,
        "layers.{i}.mlp.down_proj": "layers.{i}.mlp.down",
    },
    prefixes=("model.",),
    ignored=llama.IGNORED,
)


def spec(config: Config) -> ModelSpec:
    """Half of a head is rotated where the config does not say how much."""
    config.default(head_dim=128)
    return decoder(config, eps=1.5625e-7, ropes=(config.rope(fraction=0.5),))

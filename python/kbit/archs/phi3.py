"""Phi 3 and 4: Llama with fused q, k, v and fused gate, up; LongRoPE for the long versions."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, fused_gate_up, fused_qkv
from kbit.spec import ModelSpec

ARCHITECTURES = ("Phi3ForCausalLM",)
GGUF = Gguf("phi3", names={"blk.{i}.ffn_up": fused_gate_up("layers.{i}.mlp")})
NAMES = NameMap(
    {
        **llama.ENDS,
        **llama.NORMS,
        "layers.{i}.self_attn.qkv_proj": fused_qkv("layers.{i}.attn"),
        "layers.{i}.self_attn.o_proj": "layers.{i}.attn.o",
        "layers.{i}.mlp.gate_up_proj": fused_gate_up("layers.{i}.mlp"),
        "layers.{i}.mlp.down_proj": "layers.{i}.mlp.down",
    },
    prefixes=("model.",),
    ignored=llama.IGNORED,
)


def spec(config: Config) -> ModelSpec:
    """Every scaled rope is LongRoPE, whatever it was called ("su", "yarn")."""
    ropes = (config.rope(types={"yarn": "longrope"}),)
    return decoder(config, eps=1e-5, windows=config.windows(), ropes=ropes)

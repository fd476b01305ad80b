"""Llama: RMS norm, rotary positions, grouped queries and a gated MLP; what most others vary."""

from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("LlamaForCausalLM",)

ATTENTION = {f"layers.{{i}}.self_attn.{x}_proj": f"layers.{{i}}.attn.{x}" for x in "qkvo"}
MLP = {f"layers.{{i}}.mlp.{x}_proj": f"layers.{{i}}.mlp.{x}" for x in ("gate", "up", "down")}
NORMS = {
    "layers.{i}.input_layernorm": "layers.{i}.attn.in_norm",
    "layers.{i}.post_attention_layernorm": "layers.{i}.mlp.in_norm",
}
ENDS = {"embed_tokens": "embed", "norm": "final_norm", "lm_head": "head"}
IGNORED = ("layers.{i}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")

GGUF = Gguf("llama", interleaved=True)
NAMES = NameMap(ENDS | NORMS | ATTENTION | MLP, prefixes=("model.",), ignored=IGNORED)


def spec(config: Config) -> ModelSpec:
    """Every field is the usual one."""
    return decoder(config, eps=1e-6)

"""Seed-OSS: Llama with biases on q, k and v and heads of their own width."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.spec import ModelSpec

ARCHITECTURES = ("SeedOssForCausalLM",)
NAMES = llama.NAMES
GGUF = Gguf("seed_oss", names={"blk.{i}.post_attention_norm": "layers.{i}.mlp.in_norm"})


def spec(config: Config) -> ModelSpec:
    """Heads of 128 where the config does not say."""
    config.default(head_dim=128)
    return decoder(config, eps=1e-6)

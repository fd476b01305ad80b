"""Gemma: Llama with GeGLU, norms that store w - 1, and embeddings times sqrt(hidden_size)."""

from typing import Any

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, add_one, steps_on
from kbit.spec import ModelSpec

ARCHITECTURES = ("GemmaForCausalLM",)
NAMES = NameMap(
    steps_on(llama.NAMES.names, "norm", add_one), prefixes=("model.",), ignored=llama.IGNORED
)
GGUF = Gguf("gemma")


def spec(config: Config, **fields: Any) -> ModelSpec:
    """`hidden_act` once said gelu and meant its tanh form; `fields` are for Gemma's heirs."""
    config.only("hidden_act", "gelu", "gelu_pytorch_tanh")
    config.only("hidden_activation", "gelu_pytorch_tanh")
    config.default(head_dim=256)
    return decoder(
        config,
        eps=1e-6,
        hidden_act="gelu_tanh",
        embed_scale=config.integer("hidden_size") ** 0.5,
        **fields,
    )

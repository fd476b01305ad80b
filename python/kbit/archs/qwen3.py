"""Qwen 3: Qwen 2 without biases, with RMS norms of q and k in every head."""

from kbit.archs import llama, qwen2
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("Qwen3ForCausalLM",)
GGUF = Gguf("qwen3")
QK_NORMS = {f"layers.{{i}}.self_attn.{x}_norm": f"layers.{{i}}.attn.{x}_norm" for x in "qk"}
NAMES = NameMap({**llama.NAMES.names, **QK_NORMS}, prefixes=("model.",), ignored=llama.IGNORED)


def spec(config: Config) -> ModelSpec:
    """As Qwen 2; `head_dim` is 128 where it is absent."""
    config.default(head_dim=128)
    return decoder(config, eps=1e-6, windows=qwen2.windows(config))

"""Mistral: Llama whose layers look back over a sliding window."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.spec import ModelSpec

ARCHITECTURES = ("MistralForCausalLM",)
NAMES = llama.NAMES
GGUF = Gguf("llama", interleaved=True)


def spec(config: Config) -> ModelSpec:
    """Llama with `sliding_window`."""
    config.default(sliding_window=4096)
    return decoder(config, eps=1e-6, windows=config.windows())

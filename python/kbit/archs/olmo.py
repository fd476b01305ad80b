"""OLMo: Llama with layer norms that have no parameters, q, k and v clamped."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("OlmoForCausalLM",)
NAMES = NameMap(
    {"embed_tokens": "embed", "lm_head": "head"} | llama.ATTENTION | llama.MLP,
    prefixes=("model.",),
    ignored=llama.IGNORED,
)
GGUF = Gguf("olmo", interleaved=True)


def spec(config: Config) -> ModelSpec:
    """Every norm is a bare layer norm."""
    clip = config.optional_number("clip_qkv", 0.0)
    return decoder(config, eps=1e-5, norm="layer", clip_qkv=clip)

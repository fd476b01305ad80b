"""ERNIE 4.5: Llama with rotated pairs side by side."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, rope_halves, to
from kbit.spec import ModelSpec

ARCHITECTURES = ("Ernie4_5ForCausalLM",)
GGUF = Gguf("ernie4_5", interleaved=True)
NAMES = NameMap(
    {
        **llama.NAMES.names,
        "layers.{i}.self_attn.q_proj": to("layers.{i}.attn.q", rope_halves),
        "layers.{i}.self_attn.k_proj": to("layers.{i}.attn.k", rope_halves),
    },
    prefixes=("model.",),
    ignored=llama.IGNORED,
)


def spec(config: Config) -> ModelSpec:
    """Heads of 128 where the config does not say."""
    config.default(head_dim=128)
    return decoder(config, eps=1e-5)

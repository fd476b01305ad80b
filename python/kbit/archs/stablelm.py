"""StableLM: Llama with layer norms, a quarter of a head rotated, optionally parallel blocks."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("StableLmForCausalLM",)
NAMES = NameMap(
    llama.NAMES.names,
    prefixes=("model.",),
    ignored=llama.IGNORED,
    optional=("layers.{i}.mlp.in_norm",),
)
GGUF = Gguf("stablelm")


def spec(config: Config) -> ModelSpec:
    """Q/k norms that differ between heads (the 12B model) are refused."""
    config.only("qk_layernorm", False)
    return decoder(
        config,
        eps=1e-5,
        norm="layer",
        parallel_residual=config.flag("use_parallel_residual", False),
        ropes=(config.rope(fraction=0.25),),
    )

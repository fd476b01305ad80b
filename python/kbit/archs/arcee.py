"""Arcee (AFM): Llama with a plain MLP and squared ReLU."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("ArceeForCausalLM",)
MLP = {f"layers.{{i}}.mlp.{x}_proj": f"layers.{{i}}.mlp.{x}" for x in ("up", "down")}
NAMES = NameMap(
    llama.ENDS | llama.NORMS | llama.ATTENTION | MLP, prefixes=("model.",), ignored=llama.IGNORED
)
GGUF = Gguf("arcee", interleaved=True)


def spec(config: Config) -> ModelSpec:
    """The activation is `relu2` where the config does not say."""
    return decoder(config, eps=1e-5, mlp="plain", hidden_act=config.activation(default="relu2"))

"""StarCoder 2: Llama with layer norms, biases, a plain GELU MLP and a sliding window."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("Starcoder2ForCausalLM",)
MLP = {"layers.{i}.mlp.c_fc": "layers.{i}.mlp.up", "layers.{i}.mlp.c_proj": "layers.{i}.mlp.down"}
NAMES = NameMap(
    llama.ENDS | llama.NORMS | llama.ATTENTION | MLP, prefixes=("model.",), ignored=llama.IGNORED
)
GGUF = Gguf("starcoder2")


def spec(config: Config) -> ModelSpec:
    """All layers have the window."""
    return decoder(
        config,
        eps=1e-5,
        norm="layer",
        hidden_act=config.activation(default="gelu_pytorch_tanh"),
        mlp="plain",
        windows=config.windows(),
    )

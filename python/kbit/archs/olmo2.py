"""OLMo 2: Llama with norms after the blocks, none before, and q/k norms over the whole width."""

from kbit.archs import llama, qwen3
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("Olmo2ForCausalLM",)
NORMS = {
    "layers.{i}.post_attention_layernorm": "layers.{i}.attn.out_norm",
    "layers.{i}.post_feedforward_layernorm": "layers.{i}.mlp.out_norm",
}
NAMES = NameMap(
    llama.ENDS | NORMS | llama.ATTENTION | qwen3.QK_NORMS | llama.MLP,
    prefixes=("model.",),
    ignored=llama.IGNORED,
)
GGUF = Gguf("olmo2")


def spec(config: Config) -> ModelSpec:
    """Every field is the usual one; where the norms are is told by the tensors."""
    return decoder(config, eps=1e-5)

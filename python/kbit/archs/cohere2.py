"""Command R7B: parallel blocks under one layer norm; three local layers, which rotate, to a global."""

from kbit.archs import llama
from kbit.archs._decoder import decoder, with_layers
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, rope_halves, to
from kbit.spec import ModelSpec

ARCHITECTURES = ("Cohere2ForCausalLM",)
GGUF = Gguf("cohere2", interleaved=True, keys={"logit_scale": "logit_scale"})
NAMES = NameMap(
    {
        **llama.ENDS,
        **llama.ATTENTION,
        **llama.MLP,
        "layers.{i}.input_layernorm": "layers.{i}.attn.in_norm",
        "layers.{i}.self_attn.q_proj": to("layers.{i}.attn.q", rope_halves),
        "layers.{i}.self_attn.k_proj": to("layers.{i}.attn.k", rope_halves),
    },
    prefixes=("model.",),
    ignored=llama.IGNORED,
)


def spec(config: Config) -> ModelSpec:
    """Global layers do not rotate; logits have a factor."""
    config.default(sliding_window=4096)
    config.only("position_embedding_type", "rope_gptj")
    period = config.integer("sliding_window_pattern", 4)
    count = config.integer("num_hidden_layers")
    windows = config.windows([(i + 1) % period != 0 for i in range(count)])
    model = decoder(
        config,
        eps=1e-5,
        norm="layer",
        parallel_residual=True,
        logit_scale=config.number("logit_scale", 0.0625),
        windows=windows,
    )
    return with_layers(model, rope=[0 if window else None for window in windows])

"""Granite: Llama with a factor for embeddings, q . k, residuals and logits."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.spec import ModelSpec

ARCHITECTURES = ("GraniteForCausalLM",)
NAMES = llama.NAMES
GGUF = Gguf("granite", interleaved=True)


def spec(config: Config) -> ModelSpec:
    """Logits are divided by theirs."""
    return decoder(
        config,
        eps=1e-6,
        embed_scale=config.number("embedding_multiplier", 1.0),
        attention_scale=config.number("attention_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        logit_scale=1.0 / config.number("logits_scaling", 1.0, 1e-6),
    )

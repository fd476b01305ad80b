"""SmolLM 3: Llama without rotation in every fourth layer."""

from kbit._core import ModelFormatError
from kbit.archs import llama
from kbit.archs._decoder import decoder, with_layers
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.spec import ModelSpec

ARCHITECTURES = ("SmolLM3ForCausalLM",)
NAMES = llama.NAMES
GGUF = Gguf("smollm3", interleaved=True)


def spec(config: Config) -> ModelSpec:
    """`no_rope_layers` has 1 for layers that rotate; the others may have a window."""
    count = config.integer("num_hidden_layers")
    interval = config.integer("no_rope_layer_interval", 4)
    default = [int((i + 1) % interval != 0) for i in range(count)]
    rotates = config.sequence("no_rope_layers", count) or default
    if any(value not in (0, 1) for value in rotates):
        raise ModelFormatError(f"config: no_rope_layers must hold 0 and 1, is {rotates!r:.80}")
    windows = config.windows([not value for value in rotates])
    model = decoder(
        config, eps=1e-6, windows=windows if config.flag("use_sliding_window", False) else None
    )
    return with_layers(model, rope=[0 if value else None for value in rotates])

"""EXAONE 4: OLMo 2's norms after the blocks, q/k norms per head, global layers that do not rotate."""

from kbit.archs import olmo2
from kbit.archs._decoder import decoder, with_layers
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.spec import ModelSpec

ARCHITECTURES = ("Exaone4ForCausalLM",)
NAMES = olmo2.NAMES
GGUF = Gguf("exaone4")


def spec(config: Config) -> ModelSpec:
    """Three local layers to a global one; without a window (the 1.2B model) all layers rotate."""
    count = config.integer("num_hidden_layers")
    pattern = config.get("sliding_window_pattern") or 4
    if isinstance(pattern, str):
        local = [pattern[i % len(pattern)] == "L" for i in range(count)]
    else:
        period = config.integer("sliding_window_pattern", 4)
        local = [(i + 1) % period != 0 for i in range(count)]
    windows = config.windows(local)
    hybrid = config.optional_integer("sliding_window") is not None
    model = decoder(config, eps=1e-5, windows=windows)
    return with_layers(model, rope=[0 if window or not hybrid else None for window in windows])

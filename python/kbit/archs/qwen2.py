"""Qwen 2: Llama with biases on q, k and v, and a sliding window above `max_window_layers`."""

from kbit.archs import llama
from kbit.archs._decoder import decoder
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.spec import ModelSpec

ARCHITECTURES = ("Qwen2ForCausalLM",)
NAMES = llama.NAMES
GGUF = Gguf("qwen2")


def windows(config: Config) -> tuple[int | None, ...]:
    """The window of every layer: none unless `use_sliding_window`."""
    count, full = config.integer("num_hidden_layers"), config.integer("max_window_layers", 28, 0)
    given = config.windows([i >= full for i in range(count)])
    return given if config.flag("use_sliding_window", False) else (None,) * count


def spec(config: Config) -> ModelSpec:
    """Llama with windows in the upper layers."""
    return decoder(config, eps=1e-6, windows=windows(config))

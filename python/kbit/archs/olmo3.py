"""OLMo 3: OLMo 2 with three local layers to a global one, whose rope alone is scaled."""

from kbit.archs import olmo2
from kbit.archs._decoder import decoder, with_layers
from kbit.config import Config
from kbit.spec import ModelSpec

ARCHITECTURES = ("Olmo3ForCausalLM",)
NAMES = olmo2.NAMES


def spec(config: Config) -> ModelSpec:
    """Local layers have the plain rope of the same base."""
    config.default(sliding_window=4096)
    count = config.integer("num_hidden_layers")
    windows = config.windows([(i + 1) % 4 != 0 for i in range(count)])
    ropes = (
        config.rope(kind="full_attention"),
        config.rope(kind="sliding_attention", scaled=False),
    )
    model = decoder(config, eps=1e-5, ropes=ropes, windows=windows)
    return with_layers(model, rope=[int(window is not None) for window in windows])

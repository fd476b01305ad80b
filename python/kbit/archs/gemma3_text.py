"""Gemma 3 (text): Gemma 2 with q/k norms, five local layers to a global one, a rope for each."""

from kbit.archs import gemma, gemma2, llama, qwen3
from kbit.archs._decoder import with_layers
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, add_one, steps_on
from kbit.spec import ModelSpec

ARCHITECTURES = ("Gemma3ForCausalLM",)
NAMES = NameMap(
    steps_on({**llama.NAMES.names, **gemma2.NORMS, **qwen3.QK_NORMS}, "norm", add_one),
    prefixes=("model.",),
    ignored=llama.IGNORED,
)
GGUF = Gguf("gemma3", wide_scale_layers=62)


def spec(config: Config) -> ModelSpec:
    """Every `sliding_window_pattern`-th layer is global."""
    config.default(sliding_window=4096)
    pattern = config.integer("sliding_window_pattern", 6)
    local = [(i + 1) % pattern != 0 for i in range(config.integer("num_hidden_layers"))]
    windows = config.windows(local)
    model = gemma.spec(
        config,
        ropes=(
            config.rope(theta=1_000_000.0, kind="full_attention"),
            config.rope(kind="sliding_attention", key="rope_local_base_freq", scaled=False),
        ),
        attention_scale=config.number("query_pre_attn_scalar", 256.0, 1e-6) ** -0.5,
        attn_logit_softcapping=config.optional_number("attn_logit_softcapping", 1e-6),
        final_logit_softcapping=config.optional_number("final_logit_softcapping", 1e-6),
    )
    return with_layers(model, sliding_window=windows, rope=[int(w is not None) for w in windows])

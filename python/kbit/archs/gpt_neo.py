"""GPT-Neo: GPT-2 with unscaled q . k and every other layer local."""

from typing import Any, cast

from kbit._core import ModelFormatError
from kbit.archs._decoder import decoder
from kbit.config import Config, checked_integer
from kbit.names import NameMap
from kbit.spec import ModelSpec

ARCHITECTURES = ("GPTNeoForCausalLM",)
NAMES = NameMap(
    {
        "wte": "embed",
        "wpe": "embed.positions",
        "h.{i}.ln_1": "layers.{i}.attn.in_norm",
        "h.{i}.attn.attention.q_proj": "layers.{i}.attn.q",
        "h.{i}.attn.attention.k_proj": "layers.{i}.attn.k",
        "h.{i}.attn.attention.v_proj": "layers.{i}.attn.v",
        "h.{i}.attn.attention.out_proj": "layers.{i}.attn.o",
        "h.{i}.ln_2": "layers.{i}.mlp.in_norm",
        "h.{i}.mlp.c_fc": "layers.{i}.mlp.up",
        "h.{i}.mlp.c_proj": "layers.{i}.mlp.down",
        "ln_f": "final_norm",
        "lm_head": "head",
    },
    prefixes=("transformer.",),
    ignored=("h.{i}.attn.attention.bias", "h.{i}.attn.attention.masked_bias"),
)


def local(config: Config) -> list[bool]:
    """Which layers are local: `attention_types` has patterns and how often each repeats."""
    count = config.integer("num_hidden_layers")
    patterns = config.sequence("attention_types") or [[["global", "local"], count]]
    layers = config.sequence("attention_layers", count) or []
    if not layers:
        for item in patterns:
            pattern, times = pair(item)
            layers += pattern * min(checked_integer(times, "attention_types", 1), count)
            del layers[count:]
    if len(layers) != count or any(kind not in ("global", "local") for kind in layers):
        raise ModelFormatError(
            f"config: attention_types must say global or local {count} times: {layers!r:.80}"
        )
    return [kind == "local" for kind in layers]


def pair(item: Any) -> tuple[list[Any], Any]:
    """A pattern and a count."""
    if isinstance(item, list):
        parts = cast("list[Any]", item)
        if len(parts) == 2 and isinstance(parts[0], list):
            return cast("list[Any]", parts[0]), parts[1]
    raise ModelFormatError(f"config: attention_types has {item!r:.80}, not a pattern and a count")


def spec(config: Config) -> ModelSpec:
    """Local layers see the last `window_size` positions."""
    window = config.integer("window_size", 256)
    return decoder(
        config,
        eps=1e-5,
        norm="layer",
        hidden_act=config.activation(default="gelu_new"),
        mlp="plain",
        intermediate_size=config.integer("intermediate_size", 4 * config.integer("hidden_size")),
        ropes=(),
        attention_scale=1.0,
        windows=[window if here else None for here in local(config)],
    )

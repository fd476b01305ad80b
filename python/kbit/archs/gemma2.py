"""Gemma 2: Gemma with norms on both sides of a block, capped logits and every other layer local."""

from kbit.archs import gemma, llama
from kbit.archs._decoder import with_layers
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, add_one, steps_on
from kbit.spec import ModelSpec

ARCHITECTURES = ("Gemma2ForCausalLM",)
NORMS = {
    "layers.{i}.input_layernorm": "layers.{i}.attn.in_norm",
    "layers.{i}.post_attention_layernorm": "layers.{i}.attn.out_norm",
    "layers.{i}.pre_feedforward_layernorm": "layers.{i}.mlp.in_norm",
    "layers.{i}.post_feedforward_layernorm": "layers.{i}.mlp.out_norm",
}
NAMES = NameMap(
    steps_on({**llama.NAMES.names, **NORMS}, "norm", add_one),
    prefixes=("model.",),
    ignored=llama.IGNORED,
)
GGUF = Gguf("gemma2", wide_scale_layers=46)


def spec(config: Config) -> ModelSpec:
    """Even layers are local; the scale of q . k is a hyper-parameter."""
    config.default(sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    local = [i % 2 == 0 for i in range(config.integer("num_hidden_layers"))]
    model = gemma.spec(
        config,
        attention_scale=config.number("query_pre_attn_scalar", 256.0, 1e-6) ** -0.5,
        attn_logit_softcapping=config.optional_number("attn_logit_softcapping", 1e-6),
        final_logit_softcapping=config.optional_number("final_logit_softcapping", 1e-6),
    )
    return with_layers(model, sliding_window=config.windows(local))

"""Qwen 3 MoE: Qwen 3 with many small experts, in all layers or every few."""

from kbit.archs import llama, qwen3
from kbit.archs._decoder import decoder, with_layers
from kbit.archs._gguf import Gguf
from kbit.config import Config, checked_integer
from kbit.names import NameMap, experts_gate_up, select_expert, to
from kbit.spec import ExpertsSpec, ModelSpec

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
GGUF = Gguf("qwen3moe", experts=True, config={"norm_topk_prob": True})
EXPERTS = "layers.{i}.mlp.experts.{e}"
NAMES = NameMap(
    {
        **qwen3.NAMES.names,
        "layers.{i}.mlp.gate": "layers.{i}.mlp.router",
        "layers.{i}.mlp.experts.{e}.gate_proj": f"{EXPERTS}.gate",
        "layers.{i}.mlp.experts.{e}.up_proj": f"{EXPERTS}.up",
        "layers.{i}.mlp.experts.{e}.down_proj": f"{EXPERTS}.down",
        # As transformers 5 holds them in memory.
        "layers.{i}.mlp.experts.gate_up_proj": experts_gate_up(EXPERTS),
        "layers.{i}.mlp.experts.down_proj": to(f"{EXPERTS}.down.weight", select_expert),
    },
    prefixes=("model.",),
    ignored=llama.IGNORED,
)


def spec(config: Config) -> ModelSpec:
    """Experts in every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", 1)
    plain = [
        checked_integer(i, "mlp_only_layers", 0) for i in config.sequence("mlp_only_layers") or ()
    ]
    count = config.integer("num_hidden_layers")
    sliding = config.flag("use_sliding_window", False)
    renormalise = config.flag("norm_topk_prob", False)
    windows = config.windows()
    model = decoder(
        config,
        eps=1e-6,
        windows=windows if sliding else None,
        moe=ExpertsSpec(
            num_experts=config.integer("num_experts"),
            num_experts_per_tok=config.integer("num_experts_per_tok", 8),
            moe_intermediate_size=config.integer("moe_intermediate_size", 768),
            routing="softmax_topk_renormalise" if renormalise else "softmax_topk",
        ),
    )
    return with_layers(
        model, experts=[i not in plain and (i + 1) % step == 0 for i in range(count)]
    )

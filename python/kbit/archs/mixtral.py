"""Mixtral: Mistral with a mixture of experts for every MLP, two of eight a token."""

from kbit.archs import llama
from kbit.archs._decoder import decoder, with_layers
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, experts_gate_up, select_expert, to
from kbit.spec import ExpertsSpec, ModelSpec

ARCHITECTURES = ("MixtralForCausalLM",)
GGUF = Gguf("llama", interleaved=True, experts=True)
EXPERTS = "layers.{i}.mlp.experts.{e}"
NAMES = NameMap(
    {
        **llama.ENDS,
        **llama.NORMS,
        **llama.ATTENTION,
        "layers.{i}.block_sparse_moe.gate": "layers.{i}.mlp.router",
        "layers.{i}.block_sparse_moe.experts.{e}.w1": f"{EXPERTS}.gate",
        "layers.{i}.block_sparse_moe.experts.{e}.w3": f"{EXPERTS}.up",
        "layers.{i}.block_sparse_moe.experts.{e}.w2": f"{EXPERTS}.down",
        # As transformers 5 holds them in memory.
        "layers.{i}.mlp.gate": "layers.{i}.mlp.router",
        "layers.{i}.mlp.experts.gate_up_proj": experts_gate_up(EXPERTS),
        "layers.{i}.mlp.experts.down_proj": to(f"{EXPERTS}.down.weight", select_expert),
    },
    prefixes=("model.",),
    ignored=llama.IGNORED,
)


def spec(config: Config) -> ModelSpec:
    """All layers route; the chosen weights are renormalised."""
    model = decoder(
        config,
        eps=1e-5,
        windows=config.windows(),
        moe=ExpertsSpec(
            num_experts=config.integer("num_experts", 8),
            num_experts_per_tok=config.integer("num_experts_per_tok", 2),
            moe_intermediate_size=config.integer("intermediate_size"),
            routing="softmax_topk_renormalise",
        ),
    )
    return with_layers(model, experts=[True] * len(model.layers))

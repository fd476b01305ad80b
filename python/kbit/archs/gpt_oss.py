"""gpt-oss: experts with a clamped gate in MXFP4, attention sinks, every other layer local, YaRN."""

from kbit.archs import llama
from kbit.archs._decoder import decoder, with_layers
from kbit.archs._gguf import Gguf
from kbit.config import Config
from kbit.names import NameMap, gate_of_pairs, select_expert, to, transpose, up_of_pairs
from kbit.spec import ExpertsSpec, ModelSpec

ARCHITECTURES = ("GptOssForCausalLM",)
E = "layers.{i}.mlp.experts.{e}"
NAMES = NameMap(
    {
        **llama.ENDS,
        **llama.NORMS,
        **llama.ATTENTION,
        "layers.{i}.self_attn.sinks": "layers.{i}.attn.sinks",
        "layers.{i}.mlp.router": "layers.{i}.mlp.router",
        "layers.{i}.mlp.experts.gate_up_proj": (
            to(f"{E}.gate.weight", select_expert, transpose, gate_of_pairs),
            to(f"{E}.up.weight", select_expert, transpose, up_of_pairs),
        ),
        "layers.{i}.mlp.experts.gate_up_proj_bias": (
            to(f"{E}.gate.bias", select_expert, gate_of_pairs),
            to(f"{E}.up.bias", select_expert, up_of_pairs),
        ),
        "layers.{i}.mlp.experts.down_proj": to(f"{E}.down.weight", select_expert, transpose),
        # The same in MXFP4, already (out, in); the scales come along.
        "layers.{i}.mlp.experts.gate_up_proj_blocks": (
            to(f"{E}.gate.weight", select_expert, gate_of_pairs),
            to(f"{E}.up.weight", select_expert, up_of_pairs),
        ),
        "layers.{i}.mlp.experts.down_proj_blocks": to(f"{E}.down.weight", select_expert),
        "layers.{i}.mlp.experts.down_proj_bias": to(f"{E}.down.bias", select_expert),
    },
    prefixes=("model.",),
    ignored=(
        *llama.IGNORED,
        "layers.{i}.mlp.experts.gate_up_proj_scales",
        "layers.{i}.mlp.experts.down_proj_scales",
    ),
)
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GGUF = Gguf(
    "gpt-oss",
    experts=True,
    names={"blk.{i}.post_attention_norm": "layers.{i}.mlp.in_norm"},
    scaling={"truncate": False},
)


def spec(config: Config) -> ModelSpec:
    """Even layers are local; the gate's slope is fixed."""
    count = config.integer("num_hidden_layers")
    config.only("experts_per_token", config.integer("num_experts_per_tok", 4))
    config.get("initial_context_length")
    config.default(head_dim=64, sliding_window=128)
    if not config.has("rope_scaling"):
        config.default(rope_parameters=ROPE)
    model = decoder(
        config,
        eps=1e-5,
        windows=config.windows([i % 2 == 0 for i in range(count)]),
        ropes=(config.rope(theta=150_000.0),),
        mlp="gated_clamped",
        mlp_alpha=1.702,
        mlp_limit=config.number("swiglu_limit", 7.0, 0.0),
        moe=ExpertsSpec(
            num_experts=config.integer("num_experts"),
            num_experts_per_tok=config.integer("num_experts_per_tok", 4),
            moe_intermediate_size=config.integer("intermediate_size"),
            routing="topk_softmax",
        ),
    )
    return with_layers(model, experts=[True] * count)

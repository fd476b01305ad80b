"""Writes docs/models.md from python/kbit/archs and tests/golden: `python docs/models.py`."""

import json
from pathlib import Path

from safetensors import safe_open

from kbit import archs

DOCS = Path(__file__).parent
GOLDEN = DOCS.parent / "tests" / "golden"
HEAD = """# Models

Written by `python docs/models.py` from `python/kbit/archs` and `tests/golden`; do not edit.

{count} architectures of decoders; checked against transformers, passed / listed: {passed} / {count}.
Each runs from Hugging Face safetensors, and from GGUF where llama.cpp has a name for it. "Checked"
counts the tiny models whose logits (all positions, within 1e-4 of their standard deviation), hidden
states, attention weights and greedy continuation equal those of transformers in float32, and which at
4 and 8 bits stay within a divergence of 1e-6 (float activations) and 5e-3 (int8) of their own
dequantised weights: `tests/test_archs.py`.

| `model_type` | what is special | classes | GGUF | checked |
|---|---|---|---|---|
"""
TAIL = """
Scaled rotary embeddings, each checked past position 8,192: {ropes}. Sliding windows: checked
at 8,192 too.

Not run, and refused by name: norms after the sum (OPT 350M), q/k norms that differ between heads
(StableLM 2 12B), attention scaled by layer (`scale_attn_by_inverse_layer_idx`), vision and audio parts.

A `model_type` that is not here is one page of data: [adding.md](adding.md).
"""


def page() -> str:
    """The text of docs/models.md."""
    cases, ropes = {}, set()
    for path in sorted(GOLDEN.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            config = json.loads(file.metadata()["config"])
        if path.stem.startswith("long_"):
            ropes.add(config["rope_parameters"]["rope_type"])
        else:
            cases.setdefault(config["model_type"], []).append(path.stem)
    registry = archs.registry()
    rows = [
        f"| `{name}` | {one.summary.partition(': ')[2] or one.summary} | {', '.join(one.classes)} "
        f"| {f'`{one.gguf.name}`' if one.gguf else 'none'} | {len(cases.get(name, []))} |\n"
        for name, one in registry.items()
    ]
    tail = TAIL.format(ropes=", ".join(sorted(ropes)))
    return HEAD.format(count=len(registry), passed=len(cases.keys() & registry.keys())) + "".join(rows) + tail


if __name__ == "__main__":
    (DOCS / "models.md").write_text(page())

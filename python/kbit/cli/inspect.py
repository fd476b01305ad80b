"""`kbit inspect`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from math import prod
from typing import Any

from kbit import checkpoint, loading
from kbit._core import KbitError
from kbit.checkpoint import Source
from kbit.cli.common import (
    Commands,
    add_command,
    add_hub_options,
    add_model_argument,
    positive,
    print_json,
    print_report,
    table,
)
from kbit.spec import ModelSpec

EXAMPLES = """\
  kbit inspect model.gguf
  kbit inspect Qwen/Qwen3-0.6B --context 8192 --json
  kbit inspect ./my-model --tensors"""

CACHE_BITS = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8}
"""Of a cached number."""


def add(commands: Commands) -> None:
    """Declares `kbit inspect`."""
    parser = add_command(
        commands, "inspect", run, "say what a model file is and how kbit runs it", EXAMPLES
    )
    add_model_argument(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--context", type=positive, metavar="N", help="estimate memory for N positions"
    )
    add_hub_options(parser)


def run(args: argparse.Namespace) -> int:
    """Reads headers only, no weights."""
    options = loading.Options(
        name=args.model or str(loading.BUNDLED),
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
    )
    source = checkpoint.open_source(loading.locate(options))
    report = describe(source, args.context)
    counts = weight_counts(source)
    tensors: list[dict[str, Any]] = [
        {
            "name": name,
            "dtype": file.dtype(name),
            "shape": list(file.shape(name)),
            "bytes": file.nbytes(name),
            "bits": round(8 * file.nbytes(name) / max(counts[name], 1), 4),
        }
        for name, file in source.tensors().items()
    ]
    if args.json:
        print_json(report | {"tensors": tensors})
        return 0
    print_report(report)
    if args.tensors:
        rows = [["tensor", "dtype", "shape", "bytes", "bits"]]
        rows += [
            [
                t["name"],
                t["dtype"],
                "x".join(map(str, t["shape"])),
                f"{t['bytes']:,}",
                f"{t['bits']:.2f}",
            ]
            for t in tensors
        ]
        print(table(rows))
    return 0


def weight_counts(source: Source) -> dict[str, int]:
    """Weights in every tensor: of a saved model those of the matrix that its bytes hold, none in what fills gaps."""
    counts = {name: prod(file.shape(name)) for name, file in source.tensors().items()}
    if source.is_saved:
        matrices: dict[str, Any] = json.loads(source.files[0].metadata["kbit.tensors"])
        for name in counts:
            match matrices.get(name):
                case {"k": {"rows": int(rows), "inputs": int(inputs)}}:
                    counts[name] = rows * inputs
                case None:
                    counts[name] = 0
                case _:
                    pass
    return counts


def cache_bytes(spec: ModelSpec, kv: str) -> int:
    """What the cache takes for a position: with int8 every head's key and value have a scale in f32."""
    heads = 2 * len(spec.layers) * spec.num_key_value_heads
    scale = 4 if kv == "int8" else 0
    return heads * (spec.head_dim * CACHE_BITS[kv] // 8 + scale)


def describe(source: Source, context: int | None) -> dict[str, Any]:
    """What the headers of a model's files say."""
    tensors = source.tensors()
    counts: Counter[str] = Counter()
    stored = 0
    for name, file in tensors.items():
        counts[file.dtype(name)] += 1
        stored += file.nbytes(name)
    report: dict[str, Any] = {
        "path": str(source.path),
        "format": "kbit" if source.is_saved else source.files[0].format,
        "files": len(source.files),
        "tensors": len(tensors),
        "tensor_types": dict(counts.most_common()),
        "tensor_bytes": stored,
    }
    elements = sum(weight_counts(source).values())
    report["parameters"] = elements
    report["bits_per_weight"] = round(8 * stored / max(elements, 1), 4)
    try:
        found = loading.describe(source)
        if found.found is not None:
            found.found.sources(loading.stored_weights(source, found))
    except KbitError as error:
        return report | {"runs": f"no: {error}"}
    spec = found.spec
    positions = min(context or spec.max_position_embeddings, spec.max_position_embeddings)
    report |= {
        "architecture": found.model_type,
        "sizes": {
            name: getattr(spec, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                "head_dim", "max_position_embeddings",
            )
        } | {"num_hidden_layers": len(spec.layers)},
        "cache_bytes": {"positions": positions}
        | {kv: cache_bytes(spec, kv) * positions for kv in CACHE_BITS},
        # Weights as they are stored, and the cache in 16 bits, which is the default.
        "memory_bytes": stored + cache_bytes(spec, "f16") * positions,
    }  # fmt: skip
    try:
        tokenizer = loading.load_tokenizer(source)
    except KbitError as error:
        return report | {"runs": f"on token ids only: {error}"}
    if tokenizer is None:
        return report | {"tokenizer": "none", "runs": "on token ids only"}
    return report | {
        "tokenizer": f"{tokenizer.vocab_size} tokens, ends at {list(tokenizer.eos_ids)}",
        "chat_template": "yes" if tokenizer.chat_template else "no",
        "runs": "yes",
    }

"""`kbit convert`."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

from kbit.cli.common import (
    Commands,
    add_command,
    add_model_options,
    load_model,
    print_json,
)
from kbit.converting import convert

EXAMPLES = """\
  kbit convert ./my-model-4bit my-model.gguf
  kbit convert ./my-model my-model.gguf --bits 5
  kbit convert my-model.gguf ./my-model"""


def add(commands: Commands) -> None:
    """Declares `kbit convert`."""
    parser = add_command(
        commands,
        "convert",
        run,
        "write a model as GGUF, or as a directory that loads without work; no weight changes its value",
        EXAMPLES,
    )
    parser.add_argument("source", metavar="SRC", help="directory, .gguf, .safetensors or hub id")
    parser.add_argument(
        "target", metavar="DST", help="file to write if it ends in .gguf, or directory"
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Loads, writes, and reads the result back."""
    begin = time.perf_counter()
    target = Path(args.target)
    types: Counter[str] = Counter()
    with load_model(args, args.source) as model:
        if target.suffix == ".gguf":
            types = Counter(convert(model, target).values())
            file = target
        else:
            model.save(target)
            file = target / "model.safetensors"
        report = {
            "source": model.name,
            "target": str(target),
            "parameters": model.num_parameters,
            "weight_bytes": model.nbytes,
            "file_bytes": file.stat().st_size,
            "types": dict(types),
            "seconds": time.perf_counter() - begin,
        }
    if args.json:
        print_json(report)
    else:
        made = ", ".join(f"{count} {name}" for name, count in types.most_common())
        print(
            f"{file}: {report['parameters']:,} weights in {report['file_bytes']:,} bytes"
            f"{f' ({made})' if made else ''}, {report['seconds']:.1f} s"
        )
    return 0

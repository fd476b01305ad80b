"""`kbit quantize`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from kbit.cli.common import (
    Commands,
    add_command,
    add_model_options,
    bits_argument,
    check_writable,
    load_model,
    print_json,
)

EXAMPLES = """\
  kbit quantize ./my-model ./my-model-4bit --bits 4
  kbit quantize Qwen/Qwen3-0.6B ./qwen3-3bit --bits 'lm_head=8,mlp.down=4,*=3'"""


def add(commands: Commands) -> None:
    """Declares `kbit quantize`."""
    parser = add_command(
        commands,
        "quantize",
        run,
        "write a model in k bits to a directory that loads without work",
        EXAMPLES,
    )
    parser.add_argument("source", metavar="SRC", help="directory, .gguf, .safetensors or hub id")
    parser.add_argument("target", metavar="DST", help="directory to write; created if need be")
    parser.add_argument(
        "--bits", type=bits_argument, metavar="K", required=True,
        help="2..8, or by pattern: 'lm_head=8,*=4'",
    )  # fmt: skip
    add_model_options(parser, bits=False)


def run(args: argparse.Namespace) -> int:
    """Quantises while reading, then writes."""
    begin = time.perf_counter()
    check_writable(Path(args.target))
    with load_model(args, args.source) as model:
        model.save(args.target)
        seconds = time.perf_counter() - begin
        file = Path(args.target) / "model.safetensors"
        report = {
            "source": model.name,
            "target": str(args.target),
            "parameters": model.num_parameters,
            "weight_bytes": model.nbytes,
            "bits_per_weight": model.bits_per_weight,
            "file_bytes": file.stat().st_size,
            "seconds": seconds,
        }
    if args.json:
        print_json(report)
    else:
        print(
            f"{file}: {report['parameters']:,} weights in {report['file_bytes']:,} bytes, "
            f"{report['bits_per_weight']:.3f} bits per weight, {seconds:.1f} s"
        )
    return 0

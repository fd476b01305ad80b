"""`kbit perplexity`."""

from __future__ import annotations

import argparse
import dataclasses
from contextlib import ExitStack
from typing import Any

from kbit.cli.common import (
    Commands,
    UsageError,
    add_command,
    add_model_options,
    bits_argument,
    model_and,
    model_options,
    positive,
    print_json,
    read_text,
    table,
)
from kbit.loading import load
from kbit.perplexity import WINDOW, compare, default_window

EXAMPLES = """\
  kbit perplexity ./my-model wiki.txt
  kbit perplexity ./my-model wiki.txt --bits 8 6 5 4 3 2 --window 512
  kbit perplexity ./my-model wiki.txt --bits 4 --models my-model-Q4_0.gguf my-model-Q4_K_M.gguf

The first row is the model as stored with unquantised activations and cache; KL is the mean divergence from it in nats
per token. Bits per weight count every constant and all padding. All models are in memory at once."""


def add(commands: Commands) -> None:
    """Declares `kbit perplexity`."""
    parser = add_command(
        commands,
        "perplexity",
        run,
        "measure how well a model predicts a text, at several widths or beside others",
        EXAMPLES,
    )
    model_and(parser, "text", "UTF-8 file; - reads standard input")
    parser.add_argument(
        "--bits",
        dest="widths",
        type=bits_argument,
        nargs="+",
        default=[],
        metavar="K",
        help="widths to compare",
    )
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="PATH",
        help="other forms of the model to compare, as stored, on the same token ids",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=positive, metavar="N",
        help=f"tokens read at once, without overlap (default: {WINDOW}, or the context if that is shorter)",
    )  # fmt: skip
    parser.add_argument("--limit", type=positive, metavar="N", help="read only the first N tokens")
    add_model_options(parser, bits=False)


def run(args: argparse.Namespace) -> int:
    """Prints one table: the model as stored, then each width, then the other models."""
    if args.window == 1:
        raise UsageError("--window 1: scoring a token needs one before it")
    options = model_options(args)
    options.pop("dtype")
    text = read_text(args.text)
    with ExitStack() as stack:
        exact: dict[str, Any] = options | {"activations": "f32", "kv": args.kv or "f32"}
        reference = stack.enter_context(load(args.model, dtype=args.dtype, **exact))
        models = [stack.enter_context(load(args.model, bits=k, **options)) for k in args.widths]
        models += [stack.enter_context(load(path, **options)) for path in args.models]
        ids = reference.tokenize(text, add_special_tokens=False)[: args.limit]
        window = args.window or default_window(reference, *models)
        rows = compare(reference, models, ids, window)
    names = ["as stored", *map(_name, args.widths), *args.models]
    if args.json:
        found = [{"bits": n} | dataclasses.asdict(r) for n, r in zip(names, rows, strict=True)]
        print_json({"model": reference.name, "window": window, "rows": found})
        return 0
    head = ["bits", "bits/weight", "bytes", "perplexity", "change", "KL"]
    lines = [
        [
            name,
            f"{row.bits_per_weight:.3f}",
            f"{row.nbytes:,}",
            f"{row.perplexity:.4f}",
            f"{row.perplexity / rows[0].perplexity - 1:+.2%}",
            "" if row.kl is None else f"{row.kl:.3e}",
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    print(table([head, *lines]))
    print(f"{rows[0].tokens:,} tokens scored in windows of {window}")
    return 0


def _name(bits: int | dict[str, int | str | None]) -> str:
    return str(bits) if isinstance(bits, int) else ",".join(f"{p}={v}" for p, v in bits.items())

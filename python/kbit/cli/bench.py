"""`kbit bench`."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np

from kbit import _core
from kbit.cli.common import (
    Commands,
    UsageError,
    add_command,
    add_model_argument,
    add_model_options,
    load_model,
    positive,
    print_json,
    table,
)

EXAMPLES = """\
  kbit bench
  kbit bench ./my-model --bits 4 --prompt-tokens 512 --new-tokens 128 --batch 8

Rates are of tokens really produced: a random prompt is read, then tokens are taken greedily past any end of text."""


def add(commands: Commands) -> None:
    """Declares `kbit bench`."""
    parser = add_command(commands, "bench", run, "measure tokens per second", EXAMPLES)
    add_model_argument(parser)
    parser.add_argument(
        "--prompt-tokens", type=positive, default=256, metavar="N", help="default: 256"
    )
    parser.add_argument(
        "--new-tokens", type=positive, default=128, metavar="N", help="default: 128"
    )
    parser.add_argument("--repeat", type=positive, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="requests side by side"
    )
    parser.add_argument(
        "--limits", action="store_true", help="also measure what the machine can do, for comparison"
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the best and the median rate of prefill and decode."""
    if args.new_tokens < 2:
        raise UsageError("--new-tokens 1: a rate of decoding needs 2 at least")
    with load_model(args, args.model) as model:
        need = args.prompt_tokens + args.new_tokens
        if need > model.context:
            raise UsageError(
                f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} need {need} positions, "
                f"the context has {model.context}"
            )
        rng = np.random.default_rng(0)
        prefill: list[float] = []
        decode: list[float] = []
        for turn in range(args.repeat + 1):
            prompts = rng.integers(0, model.spec.vocab_size, (args.batch, args.prompt_tokens))
            done = model.generate(
                list(prompts), max_new_tokens=args.new_tokens, temperature=0, ignore_eos=True
            )
            if turn == 0:  # warms caches up
                continue
            # Requests of a batch run side by side: the slowest one ends each phase.
            times = [c.timings for c in done]
            prefill.append(
                sum(t.prompt_tokens for t in times) / max(t.prompt_seconds for t in times)
            )
            decode.append(
                sum(t.new_tokens - 1 for t in times) / max(t.decode_seconds for t in times)
            )
        report: dict[str, Any] = {
            "model": model.name,
            "bits_per_weight": model.bits_per_weight,
            "weight_bytes": model.nbytes,
            "threads": model.engine.threads,
            "batch": args.batch,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "prefill_tokens_per_second": {
                "best": max(prefill),
                "median": statistics.median(prefill),
            },
            "decode_tokens_per_second": {"best": max(decode), "median": statistics.median(decode)},
        }
        if args.limits:
            report["limits"] = _core.limits(threads=model.engine.threads)
        if args.json:
            print_json(report)
            return 0
        print(model)
        rows = [["tokens/s", "best", "median"]]
        for name, rates in (("prefill", prefill), ("decode", decode)):
            rows.append([name, f"{max(rates):,.1f}", f"{statistics.median(rates):,.1f}"])
        print(table(rows))
        read = model.nbytes * max(decode) / args.batch
        print(f"decoding reads {read / 1e9:,.2f} GB/s of weights")
        if args.limits:
            most = report["limits"]["read_bytes_per_second"]
            print(f"memory is read at {most / 1e9:,.2f} GB/s: decoding reaches {read / most:.0%}")
            peak = report["limits"]["int8_operations_per_second"]
            done = 2 * model.num_parameters * max(prefill)
            print(f"int8 peaks at {peak / 1e12:,.2f} TOPS: prefill reaches {done / peak:.0%}")
    return 0

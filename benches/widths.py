"""Every width in turns in one process: ratios between widths, where a shared machine changes from second to second.

    python benches/widths.py --turns 20

Takes the models that `compare.py` saved, k = 2 to 8 of one shape. A turn reads a prompt of 512 tokens and decodes 16
with each, in random order. Prints, for each width, the middle and the best tokens/s, and the middle of the ratios
within a turn: prefill over that of k = 4, and time a byte of the model over that of k = 4.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np

import kbit

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = range(2, 9)
PROMPT = 512
NEW = 16


def run(model: kbit.Model, prompt: int, new: int) -> kbit._core.Request:
    """A request that has read `prompt` random tokens and made `new`; it knows its seconds."""
    ids = np.random.default_rng().integers(300, 2000, prompt, dtype=np.uint32)
    request, made = model.engine.submit(ids, max_new_tokens=new, temperature=0.0), 0
    while (tokens := request.wait(60.0)) is not None:
        made += len(tokens)
    assert made == new, made
    return request


def main() -> int:
    """Reads the command line, measures, prints the table."""
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--shape", default="1B", help="of compare.py (default: %(default)s)")
    ask.add_argument("--turns", type=int, default=20, help="default: %(default)s, about 11 s each")
    ask.add_argument("--threads", type=int, default=None, help="default: what kbit takes")
    ask.add_argument("--cache", type=Path, default=ROOT / ".cache/compare", help="of compare.py")
    args = ask.parse_args()
    paths = {k: args.cache / f"{args.shape}-kbit{k}-ids" for k in WIDTHS}
    if missing := [k for k, path in paths.items() if not path.is_dir()]:
        ask.error(
            f"no saved models of k = {missing}: run benches/compare.py --shape {args.shape} first"
        )
    models = {
        k: kbit.load(path, threads=args.threads, context=2 * PROMPT) for k, path in paths.items()
    }
    for model in models.values():
        run(model, 8, 1)
    prefill = {k: np.zeros(args.turns) for k in WIDTHS}
    decode = {k: np.zeros(args.turns) for k in WIDTHS}
    for turn in range(args.turns):
        for k in random.sample(WIDTHS, len(WIDTHS)):
            prefill[k][turn] = PROMPT / run(models[k], PROMPT, 1).prompt_seconds
            decode[k][turn] = NEW / run(models[k], 8, 1 + NEW).decode_seconds
    print(
        f"{args.shape}, {args.turns} turns, {models[4].engine.threads} threads; kbit {kbit.__version__}\n"
    )
    print(
        "| k | MB | prefill, middle, best | decode | prefill over k = 4 | time a byte (k = 4: 1) |"
    )
    print("|---|---|---|---|---|---|")
    for k in WIDTHS:
        rates = (f"{np.median(all_[k]):.1f}, {all_[k].max():.1f}" for all_ in (prefill, decode))
        over = np.median(prefill[k] / prefill[4])
        a_byte = np.median(decode[4] / decode[k]) * models[4].nbytes / models[k].nbytes
        print(
            f"| {k} | {models[k].nbytes / 1e6:.0f} | {' | '.join(rates)} | {over:.2f} | {a_byte:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

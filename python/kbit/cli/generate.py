"""`kbit generate` and `kbit chat`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from kbit.cli.common import (
    Commands,
    add_command,
    add_model_options,
    add_sampling_options,
    load_model,
    model_and,
    print_json,
    read_text,
    sampling_options,
)
from kbit.generation import Stream

EXAMPLES = """\
  kbit generate "Once upon a time"
  kbit generate model.gguf "The sea is" --max-new-tokens 60 --temperature 0
  kbit generate Qwen/Qwen3-0.6B - --bits 4 < prompt.txt"""


def add(commands: Commands) -> None:
    """Declares `kbit generate`."""
    parser = add_command(commands, "generate", run, "continue a text, shown as it comes", EXAMPLES)
    model_and(parser, "prompt", "text to continue; - reads standard input")
    add_sampling_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the prompt and its continuation, then the speed on stderr."""
    sampling = sampling_options(args)
    prompt = read_text("-") if args.prompt == "-" else args.prompt
    with load_model(args, args.model) as model:
        if args.json:
            done = model.generate(prompt, **sampling)
            print_json({"model": model.name, "prompt": prompt} | completion(done))
            return 0
        stream = model.stream(prompt, **sampling)
        print(prompt, end="", flush=True)
        show(stream)
    return 0


def show(stream: Stream) -> None:
    """Prints a stream as it comes, then its speed."""
    with stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print(flush=True)
    t = stream.timings
    print(
        f"[{t.new_tokens} tokens at {t.decode_tokens_per_second:,.1f} tokens/s; prompt of {t.prompt_tokens} in "
        f"{t.prompt_seconds * 1e3:,.0f} ms; end: {stream.finish_reason}]",
        file=sys.stderr,
    )


def completion(done: Any) -> dict[str, Any]:
    """A completion as a JSON object, with the rates."""
    value = dataclasses.asdict(done)
    value["timings"] |= {
        "decode_tokens_per_second": done.timings.decode_tokens_per_second,
        "prompt_tokens_per_second": done.timings.prompt_tokens_per_second,
    }
    return value

"""`kbit chat`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator

from kbit.cli.common import (
    Commands,
    add_command,
    add_model_argument,
    add_model_options,
    add_sampling_options,
    load_model,
    print_json,
    sampling_options,
)
from kbit.cli.generate import completion, show

EXAMPLES = """\
  kbit chat ./my-model --bits 4 --system "Answer in one sentence."
  echo "What is the capital of France?" | kbit chat Qwen/Qwen3-0.6B --json
An empty line or end of input ends the conversation; Ctrl-C stops an answer."""


def add(commands: Commands) -> None:
    """Declares `kbit chat`."""
    parser = add_command(commands, "chat", run, "hold a conversation, one line a turn", EXAMPLES)
    add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions before the first turn")
    add_sampling_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Answers each line of standard input until an empty one."""
    sampling = sampling_options(args)
    messages: list[dict[str, str]] = []
    if args.system:
        messages.append({"role": "system", "content": args.system})
    with load_model(args, args.model) as model:
        for line in _turns():
            messages.append({"role": "user", "content": line})
            if args.json:
                done = model.chat(messages, stream=False, **sampling)
                print_json(completion(done))
                answer = done.text
            else:
                stream = model.chat(messages, stream=True, **sampling)
                try:
                    show(stream)
                except KeyboardInterrupt:
                    print()
                answer = stream.text
            messages.append({"role": "assistant", "content": answer})
    return 0


def _turns() -> Iterator[str]:
    """Lines of the user, with a prompt where somebody types them."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if not line.strip():
                return
            yield line.rstrip("\n")
        return
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # gives input() line editing

    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line.strip():
            return
        yield line

"""The command line: `kbit generate | chat | quantize | convert | inspect | perplexity | bench | doctor`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from kbit import KbitError, __version__
from kbit.cli import bench, chat, convert, doctor, generate, inspect, perplexity, quantize
from kbit.cli.common import Parser, UsageError

COMMANDS = (generate, chat, quantize, convert, inspect, perplexity, bench, doctor)

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

EPILOG = """\
examples:
  kbit generate "Once upon a time"                      the bundled model tells a story
  kbit generate Qwen/Qwen3-0.6B "The sea is" --bits 4   a model of the hub, in 4 bits
  kbit chat ./my-model --bits 3                         a conversation with a directory
  kbit quantize ./my-model ./my-model-4bit --bits 4     do the work once
  kbit doctor                                           what this machine offers

Each command explains itself with --help and prints JSON with --json.
Exit codes: 0 done, 1 failed, 2 wrong usage. KBIT_LOG=debug shows tracebacks."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = Parser(
        prog="kbit",
        description="Runs language models in 2 to 8 bits per weight.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"kbit {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0, or 1 if it failed. Wrong usage raises SystemExit(2), as argparse does.
    """
    args = parser().parse_args(argv)
    level = os.environ.get("KBIT_LOG", "").upper() or "WARNING"
    if level not in LOG_LEVELS:
        args.parser.error(f"KBIT_LOG={level.lower()} is none of {', '.join(LOG_LEVELS).lower()}")
    logging.basicConfig(level=level)
    try:
        return args.run(args)
    except UsageError as error:
        args.parser.error(str(error))
    except KeyboardInterrupt:
        print("kbit: interrupted", file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KbitError, OSError, ValueError, MemoryError) as error:
        if level == "DEBUG":
            raise
        print(f"kbit: error: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
    return 1

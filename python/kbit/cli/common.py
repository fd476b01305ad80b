"""What commands share: model and sampling options, JSON output."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

from kbit.loading import load, parse_bytes
from kbit.model import Model
from kbit.quantizing import BitsPlan
from kbit.sampling import SamplingParams

Commands = Any
"""What `add_subparsers` returns; argparse gives its type no public name."""


class UsageError(Exception):
    """An argument that is wrong in itself: exit code 2."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of after a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help explains.\n")


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A subcommand with its examples and `--json`."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Positional argument `[MODEL]`."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="directory, .gguf, .safetensors or hub id (default: the bundled model)",
    )  # fmt: skip


def add_hub_options(parser: Any) -> None:
    """Options of what may come from the hub; `parser` may be a group of one."""
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--cache-dir", metavar="DIR", help="instead of the hub's cache")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")


def add_model_options(parser: argparse.ArgumentParser, *, bits: bool = True) -> None:
    """Options of `kbit.load`."""
    group = parser.add_argument_group("model")
    if bits:
        group.add_argument(
            "--bits", type=bits_argument, metavar="K",
            help="quantise matrices to K bits, 2..8; or by pattern: 'lm_head=8,*=4' (default: as stored)",
        )  # fmt: skip
    group.add_argument(
        "--dtype", choices=("f32", "f16", "bf16"), help="of weights that are not quantised"
    )
    group.add_argument("--device", choices=("cpu", "gpu"), help="default: KBIT_DEVICE, then cpu")
    group.add_argument("--threads", type=positive, metavar="N",
        help="default: KBIT_NUM_THREADS, then all cores, less one while decoding on 4 or more",
    )  # fmt: skip
    group.add_argument("--context", type=positive, metavar="N", help="positions of a sequence")
    group.add_argument("--kv", choices=("f32", "f16", "bf16", "int8"), help="type of the cache")
    group.add_argument(
        "--activations", choices=("int8", "f32"), default="int8", help="default: int8"
    )
    group.add_argument(
        "--memory", type=memory, metavar="SIZE", help="limit of weights and cache: 8GB, 512MiB"
    )
    add_hub_options(group)


_MODEL = (
    "bits", "dtype", "device", "threads", "context", "kv", "activations", "memory", "revision", "cache_dir",
    "local_files_only",
)  # fmt: skip


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `kbit.load`."""
    options = {name: getattr(args, name) for name in _MODEL if hasattr(args, name)}
    try:
        BitsPlan(options.get("bits"), options.get("dtype"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return options


def load_model(args: argparse.Namespace, name: str | None) -> Model:
    """The model that the options ask for; the bundled one without a name."""
    return load(name, **model_options(args))


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options of `kbit.SamplingParams`; without one, the model's default holds."""
    group = parser.add_argument_group("sampling (default: what the model's files say, else greedy)")
    group.add_argument("--max-new-tokens", "-n", type=int, metavar="N", help="default: 256")
    group.add_argument(
        "--temperature", "-t", type=float, metavar="T", help="0: the most likely token"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely; 0: all")
    group.add_argument("--top-p", type=float, metavar="P", help="keep those that reach P together")
    group.add_argument("--min-p", type=float, metavar="P", help="drop those under P of the best")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="1: none")
    group.add_argument("--seed", type=int, metavar="S", help="same seed, same text")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before TEXT; repeatable"
    )
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end")


_SAMPLING = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "ignore_eos",
)  # fmt: skip


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `SamplingParams` that were given, checked."""
    given = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    try:
        SamplingParams(**given)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return given


def model_and(parser: argparse.ArgumentParser, last: str, help: str) -> None:
    """Positional arguments `[MODEL] last`."""
    add_model_argument(parser)
    parser.add_argument(last, metavar=last.upper(), help=help)


def bits_argument(text: str) -> int | dict[str, int | str | None]:
    """`4`, or `lm_head=8,*=4`."""
    if "=" not in text:
        return _width(text)
    rules: dict[str, int | str | None] = {}
    for rule in text.split(","):
        pattern, _, value = rule.partition("=")
        rules[pattern.strip()] = value if value in ("f32", "f16", "bf16") else _width(value)
    return rules


def _width(text: str) -> int:
    try:
        bits = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width in 2..8") from None
    if not 2 <= bits <= 8:
        raise argparse.ArgumentTypeError(f"{bits} is not in 2..8")
    return bits


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def memory(text: str) -> str:
    """An amount of memory, checked and left as written."""
    try:
        parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def print_json(value: Any) -> None:
    """One JSON object on stdout; dataclasses as objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    json.dump(value, sys.stdout, ensure_ascii=False, allow_nan=False, default=str)
    print()


def print_report(report: Mapping[str, Any], indent: str = "") -> None:
    """Names and values, one a line; what is inside a value is indented."""
    for name, value in report.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:")
            print_report(cast("Mapping[str, Any]", value), indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


def check_writable(target: Path) -> None:
    """Refuses a directory that cannot be written, before the work and not after it.

    Raises:
        OSError: It, or the directory that would hold it, is no directory or not writable.
    """
    here = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not here.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(here))
    if not os.access(here, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(here))


def read_text(path: str) -> str:
    """A text file as UTF-8; `-` is standard input."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    return data.decode("utf-8", "replace")


def table(rows: list[list[str]]) -> str:
    """Columns aligned; the first row is the head. Text left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)

"""`kbit doctor`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from typing import Any

from kbit import _core
from kbit._core import KbitError
from kbit.cli.common import Commands, add_command, print_json, print_report
from kbit.loading import load

EXAMPLES = """\
  kbit doctor
  KBIT_ISA=scalar kbit doctor --json"""

PROMPT = "Once upon a time"


def add(commands: Commands) -> None:
    """Declares `kbit doctor`."""
    add_command(
        commands, "doctor", run, "say what this build and machine offer, and try it", EXAMPLES
    )


def run(args: argparse.Namespace) -> int:
    """Prints the build, the machine, and what a real generation does."""
    build = _core.build_info()
    report: dict[str, Any] = {f"kbit_{name}": value for name, value in build.items()}
    report |= {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "instruction_sets": ", ".join(_core.isas()),
        "chosen": _core.isa(),
        "threads": _core.default_threads(),
        "gpu_adapters": ", ".join(_core.gpu_adapters()) or "none",
        "environment": {
            name: os.environ[name]
            for name in ("KBIT_ISA", "KBIT_NUM_THREADS", "KBIT_DEVICE", "KBIT_LOG")
            if name in os.environ
        },
    }
    well = True
    try:
        with load() as model:
            done = model.generate(PROMPT, max_new_tokens=32, temperature=0)
        report["self_check"] = {
            "text": PROMPT + done.text,
            "decode_tokens_per_second": round(done.timings.decode_tokens_per_second, 1),
        }
        # A model that works has learned to spell: most of what it says is letters.
        well = sum(c.isalpha() or c.isspace() for c in done.text) > 0.8 * max(len(done.text), 1)
        if not well or not done.text:
            report["self_check"]["error"] = "the bundled model does not write text"
    except (KbitError, OSError, ValueError) as error:
        well = False
        report["self_check"] = {"error": str(error)}
    report["well"] = well
    if args.json:
        print_json(report)
    else:
        print_report(report)
        if not well:
            print("kbit: the self-check failed", file=sys.stderr)
    return 0 if well else 1

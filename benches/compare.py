"""kbit beside llama.cpp, mistral.rs and PyTorch on the same machine, in one run.

    python benches/compare.py                                           all of the 1B shape, some 90 minutes
    python benches/compare.py --shape 0.5B --bits 4 --only widths isas  some 10 minutes

writes benches/results/<date>-<shape>.md, anew after every round. Random weights of a real shape are written once as a
Hugging Face directory and as GGUF; kbit quantises the one, llama-quantize the other; the first run also builds
llama.cpp. Engines run one after the other in every round, with several turns of what takes seconds, and the best
counts for each figure; what runs on the same type of file runs side by side: a shared machine reads memory and
multiplies two or three times as fast in one second as in the next. kbit's share of the bandwidth is that of the
middle round, decode over plain reading between two decodes of one process. A peer that cannot be had ends the run. A
measurement that fails or takes too long is not repeated: its reason stands below the tables, which say "failed" where
no round gave a figure, and the exit code is 1. Use an idle machine: engines whose threads wait for each other take
minutes on a busy one. 30 GB of disk, 8 GB of memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import peers
import shapes
from ours import BATCH_TURNS, BATCHES, DEPTH, PROMPTS, TURNS

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
NEAREST = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_0", 5: "Q5_K_M", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}
SAME_FILE = ("Q4_0", "Q4_K_M", "Q6_K", "Q8_0")
DEEP_ROUNDS = 2
"""Rounds of what is measured at depth: every one reads 4096 tokens several times."""
SMALL = {"load", "first_token", "peak", "resident", "read", "near", "far"}
"""Figures of which the least counts; of `beside` it is the median, of others the largest."""

Measures = dict[str, float]


@dataclass
class Row:
    """One engine on one file: every figure in every round."""

    name: str
    near: str
    """Type of the file, next to whose others it runs."""
    measure: Callable[[], Measures]
    rounds: int
    found: dict[str, list[float]] = field(default_factory=dict)
    failed: str = ""

    def again(self) -> None:
        """Another round."""
        try:
            measured = self.measure()
        except peers.Failed as error:
            self.failed = str(error)
            return
        for key, value in measured.items():
            self.found.setdefault(key, []).append(value)

    def __getitem__(self, key: str) -> float:
        """A figure; not a number where there is none."""
        if key == "prefill" and "near" in self.found:
            # Of two prompts, each at its best: the difference of two in one round is mostly that of its minutes.
            seconds = self["far"] - self["near"]
            return 512 / seconds if seconds > 0 else float("nan")
        values = self.found.get(key, [float("nan")])
        if key == "beside":
            return statistics.median(values)
        return min(values) if key in SMALL else max(values)

    def share(self, nbytes: float) -> float:
        """Of the bandwidth, where a token reads so many bytes."""
        return self["beside"] * nbytes


FILL = "import sys, numpy; numpy.full(int(sys.argv[1]), 1, numpy.uint8)"
"""Writes to so many bytes of fresh memory, in huge pages."""


def warm(model: Path) -> None:
    """Makes the machine ready for an engine that loads this file or folder.

    Reads the files, as the system may have dropped them from its cache for others. Then four times as much memory,
    more than any engine has at its peak, is taken and given back (of what is free at most half): a virtual machine
    that returned free memory to its host gets it again at less than 1 GB/s.
    """
    size = 0
    for file in [model] if model.is_file() else model.iterdir():
        with file.open("rb") as data:
            while part := data.read(1 << 24):
                size += len(part)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    peers.run(sys.executable, "-c", FILL, str(min(4 * size, free // 2)), timeout=600)


@dataclass
class Bench:
    """What all parts share: files, peers, and the rows, each measured once a round whoever shows it."""

    name: str
    """Of the shape."""
    shape: shapes.Shape
    source: Path
    saved: dict[int, Path]
    files: dict[str, Path]
    peer: peers.Peers
    threads: int
    rounds: int
    timeout: float
    rows: dict[str, Row] = field(default_factory=dict)
    reads: list[float] = field(default_factory=list)
    """GB/s before the first round and after each."""
    peak: float = 0.0
    """TOPS: what the machine can do."""

    @property
    def bandwidth(self) -> float:
        """GB/s at best."""
        return max(self.reads)

    def row(self, name: str, near: str, measure: Callable[[], Measures], rounds: int = 99) -> Row:
        """The row of that name."""
        return self.rows.setdefault(name, Row(name, near, measure, min(rounds, self.rounds)))

    def kbit(
        self,
        name: str,
        near: str,
        model: Path,
        what: str = "speed",
        isa: str = "",
        rounds: int = 99,
    ) -> Row:
        """kbit in a process of its own; see `ours.py`."""

        def measure() -> Measures:
            script = Path(__file__).with_name("ours.py")
            warm(model)
            ran = peers.run(sys.executable, script, model, str(self.threads), what, str(time.time()),
                            timeout=self.timeout, env={"KBIT_ISA": isa})  # fmt: skip
            found = json.loads(ran.output.splitlines()[-1])
            return {key: value for key, value in found.items() if not isinstance(value, str)}

        return self.row(name, near, measure, rounds)

    def isas(self) -> tuple[str, list[str]]:
        """The instruction set kbit chooses here, and all it has here."""
        ask = "import kbit, json; print(json.dumps([kbit.isa(), kbit.isas()]))"
        chosen, found = json.loads(
            peers.run(sys.executable, "-c", ask, timeout=self.timeout).output
        )
        return chosen, found

    def llama(self, kind: str, variant: str = "native") -> Row:
        """llama.cpp on the file of type `kind`; variant: native, avx2, no_amx."""
        binaries: Path = getattr(self.peer, variant)
        if binaries == self.peer.native:
            variant = "native"
        name = (
            f"llama.cpp {kind}"
            + {"native": "", "avx2": ", AVX2 build", "no_amx": ", built without AMX"}[variant]
        )

        def measure() -> Measures:
            file = self.files[kind]
            return peers.llama_bench(
                binaries, file, self.threads, self.timeout, prompts=PROMPTS, turns=TURNS
            )

        return self.row(name, kind, measure)

    def llama_start(self, kind: str) -> Measures:
        """A process of llama.cpp that only loads and reads 8 ids."""
        warm(self.files[kind])
        return peers.llama_start(self.peer.native, self.files[kind], self.threads, self.timeout)

    def llama_deep(self, flash: str) -> Measures:
        """llama.cpp's Q4_0 behind many tokens."""
        model = self.files["Q4_0"]
        return peers.llama_bench(
            self.peer.native, model, self.threads, self.timeout, depth=DEPTH, flash=flash
        )

    def llama_batches(self) -> Measures:
        """llama.cpp's Q4_0 in batches."""
        return peers.llama_batch(
            self.peer.native, self.files["Q4_0"], self.threads, BATCHES, BATCH_TURNS, self.timeout
        )

    def mistral(self) -> Row:
        """mistral.rs on Q4_K_M."""

        def measure() -> Measures:
            file = self.files["Q4_K_M"]
            warm(file)
            return peers.mistral(
                self.peer, file, self.threads, "speed", self.timeout, prompts=PROMPTS, turns=TURNS
            )

        return self.row("mistral.rs Q4_K_M", "Q4_K_M", measure)

    def mistral_deep(self) -> Measures:
        """The same behind many tokens."""
        return peers.mistral(self.peer, self.files["Q4_K_M"], self.threads, "depth", self.timeout)

    def mistral_batches(self) -> Measures:
        """The same in batches."""
        return peers.mistral(
            self.peer, self.files["Q4_K_M"], self.threads, "batch", self.timeout,
            turns=BATCH_TURNS, batches=BATCHES,
        )  # fmt: skip

    def torch(self) -> Row:
        """PyTorch on the weights before quantisation, in bfloat16."""
        return self.row(
            "PyTorch bf16",
            "bf16",
            lambda: peers.torch(self.peer, self.source, self.threads, PROMPTS, self.timeout),
        )

    def measure(self, done: Callable[[int], None]) -> None:
        """Every row once a round, the limits of the machine before the first and after each.

        `done` is told how many rounds there were, after each.
        """
        most = max(row.rounds for row in self.rows.values())
        kinds = list(dict.fromkeys(row.near for row in self.rows.values()))
        rows = sorted(self.rows.values(), key=lambda row: kinds.index(row.near))
        self.limits()
        for turn in range(most):
            for row in rows:
                if turn >= row.rounds or row.failed:
                    continue
                start = time.monotonic()
                row.again()
                took = f"{time.monotonic() - start:.1f} s"
                note = f"failed: {row.failed}" if row.failed else took
                print(f"round {turn + 1}/{most}: {row.name}: {note}", file=sys.stderr, flush=True)
            self.limits()
            done(turn + 1)

    def limits(self) -> None:
        """Measures the machine."""
        ran = peers.run(sys.executable, "-m", "kbit", "bench", "--repeat", "1", "--limits",
                        "--threads", str(self.threads), "--json", timeout=self.timeout)  # fmt: skip
        found = json.loads(ran.output)["limits"]
        self.reads.append(found["read_bytes_per_second"] / 1e9)
        self.peak = max(self.peak, found["int8_operations_per_second"] / 1e12)


def n(value: float, digits: int = 0) -> str:
    """A figure of the table."""
    return "failed" if value != value else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A share."""
    return "failed" if value != value else f"{100 * value:.0f} %"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(r) + " |" for r in rows),
        "",
    ]


def rates(*rows: Row) -> list[str]:
    """Prefill and decode of each."""
    return [text for row in rows for text in (n(row["prefill"]), n(row["decode"], 1))]


def ratios(ours: Row, theirs: Row) -> list[str]:
    """How many times as fast as theirs ours is, at prefill and decode."""
    return [n(ours[key] / theirs[key], 2) for key in ("prefill", "decode")]


Render = Callable[[], list[str]]


def widths(b: Bench) -> Render:
    """Every width against the type of nearest size, and k = 4 against the rest."""
    ours = {
        bits: b.kbit(f"kbit {bits} bits", NEAREST[bits], path) for bits, path in b.saved.items()
    }
    kinds = sorted({NEAREST[bits] for bits in b.saved} | {"Q4_0", "Q4_K_M"})
    theirs = {kind: b.llama(kind) for kind in kinds}
    rust, torch = b.mistral(), b.torch()

    def render() -> list[str]:
        base = ours.get(4, next(iter(ours.values())))
        out = ["## Every width", "", "Prefill of 512 tokens, decode of 128, tokens/s.", ""]
        rows = []
        for bits, row in ours.items():
            kind = NEAREST[bits]
            a_byte = base["decode"] * base["nbytes"] / (row["decode"] * row["nbytes"])
            rows.append(
                [str(bits), n(row["bits"], 2), n(row["nbytes"] / 1e6), *rates(row),
                 percent(row["prefill"] * b.shape.operations() / 1e12 / b.peak),
                 percent(row.share(row["nbytes"])),
                 percent(row["decode"] * row["nbytes"] / 1e9 / b.bandwidth), n(a_byte, 2),
                 kind, n(b.files[kind].stat().st_size / 1e6), *rates(theirs[kind]), *ratios(row, theirs[kind])]
            )  # fmt: skip
        out += table(
            ["k", "bits/weight", "MB", "prefill", "decode", "of int8 peak", "of bandwidth", "of its best",
             "time a byte (k = 4: 1)", "llama.cpp type", "MB", "prefill", "decode", "prefill ratio", "decode ratio"],
            rows,
        )  # fmt: skip
        if 4 in ours:
            against = [theirs["Q4_0"], theirs["Q4_K_M"], rust, torch]
            out += table(["k = 4 against", "prefill", "decode", "prefill ratio", "decode ratio"],
                         [[row.name, *rates(row), *ratios(ours[4], row)] for row in against])  # fmt: skip
        return out

    return render


def memory(b: Bench) -> Render:
    """Loading, the first token, and memory."""
    near = NEAREST
    ours = {bits: b.kbit(f"kbit {bits} bits", near[bits], path) for bits, path in b.saved.items()}
    reads = {
        bits: b.kbit(f"reading {bits} bits", near[bits], path, "read")
        for bits, path in b.saved.items()
    }
    bare = {
        bits: b.kbit(f"kbit {bits} bits from ids", near[bits], without_tokenizer(path), "start")
        for bits, path in b.saved.items()
    }
    kinds = ("Q4_0", "Q4_K_M")
    theirs = {
        kind: (
            b.llama(kind),
            b.row(f"llama.cpp {kind}, start", kind, lambda kind=kind: b.llama_start(kind)),
        )
        for kind in kinds
    }
    rust = b.mistral()
    kv = b.shape.kv_bytes() * 513

    def share(row: Row, key: str, size: float) -> list[str]:
        return [n(row[key] / 1e6), n(row[key] / (size + kv), 2)]

    def render() -> list[str]:
        rows = []
        for bits, row in ours.items():
            read, ids = reads[bits], bare[bits]
            seconds = [ids["load"], read["read"], ids["load"] / read["read"], row["load"]]
            seconds += [ids["first_token"], row["first_token"]]
            sizes = share(ids, "resident", read["file"]) + share(row, "resident", read["file"])
            sizes += share(row, "peak", read["file"])
            rows.append([row.name, *(n(x, 2) for x in seconds), *sizes])
        for kind, (row, start) in theirs.items():
            size = b.files[kind].stat().st_size
            rows.append(
                [
                    row.name,
                    "",
                    "",
                    "",
                    "",
                    n(start["first_token"], 2),
                    "",
                    "",
                    "",
                    "",
                    "",
                    *share(row, "peak", size),
                ]
            )
        size = b.files["Q4_K_M"].stat().st_size
        start = ["", "", "", n(rust["load"], 2), "", n(rust["first_token"], 2), "", "", "", ""]
        rows.append([rust.name, *start, *share(rust, "peak", size)])
        return [
            "## Load and memory", "",
            f"Seconds, from a warm file cache; the tokenizer.json has {b.shape.vocab} entries. Memory after a "
            "prompt of 512.", "",
            *table(["", "load", "reading the file", "ratio", "load with tokenizer", "start to first token from ids",
                    "with tokenizer", "resident MB from ids", "of file + KV", "with tokenizer", "of file + KV",
                    "peak MB", "of file + KV"], rows),
        ]  # fmt: skip

    return render


def files(b: Bench) -> Render:
    """kbit and llama.cpp on the same GGUF files."""
    pairs = [
        (kind, b.kbit(f"kbit on {kind}", kind, b.files[kind]), b.llama(kind)) for kind in SAME_FILE
    ]

    def render() -> list[str]:
        rows = [
            [
                kind,
                *rates(x),
                percent(x.share(x["nbytes"])),
                *rates(y),
                *ratios(x, y),
            ]
            for kind, x, y in pairs
        ]
        head = ["type", "kbit prefill", "decode", "of bandwidth"]
        head += ["llama.cpp prefill", "decode", "prefill ratio", "decode ratio"]
        return ["## The same GGUF file", "", *table(head, rows)]

    return render


def isas(b: Bench) -> Render:
    """k = 4 on older instruction sets against builds of llama.cpp for them."""
    chosen, found = b.isas()

    def ours(isa: str) -> Row | None:
        if isa not in found:
            return None
        if isa == chosen:
            # The row of `widths`: one program measured twice would have two speeds where memory has.
            return b.kbit("kbit 4 bits", NEAREST[4], b.saved[4])
        return b.kbit(f"kbit 4 bits, {isa}", "Q4_0", b.saved[4], isa=isa)

    variants = (("amx", "native"), ("avx512vbmi", "no_amx"), ("avx2", "avx2"))
    rows = [(isa, ours(isa), b.llama("Q4_0", variant)) for isa, variant in variants]

    def render() -> list[str]:
        lines = []
        for isa, x, y in rows:
            speed, ratio = (
                (["not measured", ""], ["", ""]) if x is None else (rates(x), ratios(x, y))
            )
            lines.append([isa, *speed, y.name, *rates(y), *ratio])
        head = [
            "KBIT_ISA",
            "prefill",
            "decode",
            "against",
            "prefill",
            "decode",
            "prefill ratio",
            "decode ratio",
        ]
        return ["## Instruction sets, k = 4 against Q4_0", "", *table(head, lines)]

    return render


def depth(b: Bench) -> Render:
    """Prefill of 512 and decode of 128 behind 4096 tokens."""
    near = "at depth"
    ours = b.kbit("kbit 4 bits at depth", near, b.saved[4], "depth", rounds=DEEP_ROUNDS)
    theirs = [
        b.row(f"llama.cpp Q4_0 at depth, {how}", near, measure, DEEP_ROUNDS)
        for how, measure in (
            ("flash attention", lambda: b.llama_deep("on")),
            ("no flash attention", lambda: b.llama_deep("off")),
        )
    ]
    theirs.append(b.row("mistral.rs Q4_K_M at depth", near, b.mistral_deep, DEEP_ROUNDS))

    def render() -> list[str]:
        read = ours["nbytes"] + b.shape.kv_bytes() * (DEPTH + 64)
        share = percent(ours.share(read))
        head = ["", "prefill 512", "decode 128", "kbit's prefill ratio", "decode ratio"]
        rows = [[row.name, *rates(row), *ratios(ours, row)] for row in (ours, *theirs)]
        note = f"kbit's decode reads weights, keys and values at {share} of the bandwidth."
        return [f"## At depth {DEPTH}", "", note, "", *table(head, rows)]

    return render


def batch(b: Bench) -> Render:
    """Several sequences together."""
    near = "batches"
    chosen, found = b.isas()
    rows: dict[str, Row | None] = {
        f"kbit 4 bits, {isa}": b.kbit(
            f"kbit 4 bits, batches, {isa}", near, b.saved[4], "batch", isa
        )
        if isa in found
        else None
        for isa in dict.fromkeys((chosen, "amx", "avx512vbmi", "avx2"))
    }
    rows["llama.cpp Q4_0"] = b.row("llama.cpp Q4_0, batches", near, b.llama_batches)
    rows["mistral.rs Q4_K_M"] = b.row("mistral.rs Q4_K_M, batches", near, b.mistral_batches)

    def render() -> list[str]:
        lines = []
        for name, row in rows.items():
            if row is None:
                lines.append([name, "not measured", *[""] * (len(BATCHES) - 1)])
                continue
            each = [row[f"batch{size}"] for size in BATCHES]
            lines.append([name, *(f"{n(x)} ({n(x / each[0], 2)})" for x in each)])
        head = ["", *map(str, BATCHES)]
        return [
            "## Batched decode, all tokens/s (times one sequence)",
            "",
            *table(head, lines),
        ]

    return render


PARTS = {
    "widths": widths,
    "memory": memory,
    "files": files,
    "isas": isas,
    "depth": depth,
    "batch": batch,
}


def without_tokenizer(saved: Path) -> Path:
    """The same saved model without its tokenizer, for what starts from token ids."""
    to = saved.with_name(saved.name + "-ids")
    to.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        if not (to / name).exists():
            (to / name).hardlink_to(saved / name)
    return to


def machine(threads: int) -> str:
    """Processor, instruction sets and the commit that is measured."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in reversed(info.splitlines()) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    wanted = [
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512vbmi",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
    ]
    has, lacks = [f for f in wanted if f in flags], [f for f in wanted if f not in flags]
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"{facts.get('model name', platform.processor())} "
        f"(family {facts.get('cpu family')}, model {facts.get('model')}), {os.cpu_count()} cores, "
        f"{threads} threads; has {' '.join(has)}; lacks {' '.join(lacks) or 'none asked for'}. "
        f"kbit {commit or 'outside git'}."
    )


def prepare(args: argparse.Namespace, parts: list[str]) -> Bench:
    """Peers and every file the parts need."""
    peer = peers.get(args.cache, jobs=os.cpu_count() or 1)
    source: Path = args.cache / args.shape
    print("weights", file=sys.stderr, flush=True)
    peers.run(
        peer.python, Path(__file__).with_name("shapes.py"), args.shape, args.cache, timeout=3600
    )
    gguf = source.with_name(source.name + "-bf16.gguf")
    saved = {}
    for bits in args.bits:
        saved[bits] = args.cache / f"{args.shape}-kbit{bits}"
        if not saved[bits].exists():
            print(f"quantising to {bits} bits", file=sys.stderr, flush=True)
            peers.run(
                sys.executable,
                "-m",
                "kbit",
                "quantize",
                source,
                saved[bits],
                "--bits",
                str(bits),
                timeout=3600,
            )
    kinds = {"Q4_0", "Q4_K_M"}
    if "widths" in parts:
        kinds |= {NEAREST[bits] for bits in args.bits}
    if "files" in parts:
        kinds |= set(SAME_FILE)
    found = {kind: peers.quantised(peer, gguf, kind) for kind in sorted(kinds)}
    shape = shapes.SHAPES[args.shape]
    return Bench(
        args.shape,
        shape,
        source,
        saved,
        found,
        peer,
        args.threads,
        args.rounds,
        args.timeout,
    )


def report(b: Bench, renders: list[Render], rounds: int, minutes: float) -> str:
    """All tables after so many rounds."""
    planned = "" if rounds == b.rounds else f" (of {b.rounds}: not finished)"
    lines = [
        f"# {b.name} shape, {datetime.date.today()}",
        "",
        machine(b.threads),
        *b.peer.notes,
        "",
        f"llama-cpp-python {peers.LLAMA_CPP}, mistral.rs {peers.MISTRALRS}, PyTorch {peers.TORCH}; best of "
        f"{rounds} interleaved rounds{planned}, {min(rounds, DEEP_ROUNDS)} at depth, each of {PROMPTS} prompts, "
        f"{TURNS} decodes and {BATCH_TURNS} of batches, {minutes:.0f} minutes.",
        f"Limits, before the first round and after each: memory was read at {min(b.reads):.1f} to {b.bandwidth:.1f} "
        f"GB/s (middle {statistics.median(b.reads):.1f}), int8 peaked at {b.peak:.2f} TOPS. Shares of the bandwidth "
        "are those of the middle round, each of the plain or prefetched read (1 GiB, best of five) between two decodes "
        "of one process; shares of its best are the best decode over the best read of the whole run.",
        "",
    ]
    for render in renders:
        lines += render()
    failed = [row for row in b.rows.values() if row.failed]
    if failed:
        reasons = (f"- {row.name}: `{' '.join(row.failed.split())[:600]}`" for row in failed)
        lines += ["## Failed", "", *reasons, ""]
    return "\n".join(lines)


def main() -> None:
    """Run it."""
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--shape", choices=sorted(shapes.SHAPES), default="1B")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    ask.add_argument("--threads", type=int, default=min(4, cores))
    ask.add_argument(
        "--rounds", type=int, default=4, help=f"default 4; at depth at most {DEEP_ROUNDS}"
    )
    ask.add_argument("--bits", type=int, nargs="+", default=list(WIDTHS), choices=WIDTHS)
    ask.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; default: all"
    )
    ask.add_argument("--timeout", type=float, default=900, help="seconds one measurement may take")
    ask.add_argument(
        "--cache",
        type=Path,
        default=ROOT / ".cache/compare",
        help="where peers and models are kept",
    )
    ask.add_argument("--output", type=Path, help="default: benches/results/<date>-<shape>.md")
    args = ask.parse_args()
    args.cache = args.cache.absolute()
    if 4 not in args.bits and set(args.only) - {"widths", "memory", "files"}:
        ask.error("the parts isas, depth and batch are measured with 4 bits: leave 4 in --bits")
    to: Path = args.output or ROOT / f"benches/results/{datetime.date.today()}-{args.shape}.md"
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        b = prepare(args, args.only)
        renders = [PARTS[part](b) for part in PARTS if part in args.only]
        start = time.monotonic()

        def done(rounds: int) -> None:
            part = to.with_name(to.name + ".part")
            part.write_text(report(b, renders, rounds, (time.monotonic() - start) / 60))
            part.replace(to)

        b.measure(done)
    except peers.Failed as error:
        sys.exit(f"compare: {error}")
    print(to.read_text())
    sys.exit(1 if any(row.failed for row in b.rows.values()) else 0)


if __name__ == "__main__":
    main()

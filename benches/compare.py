"""kbit beside llama.cpp and mistral.rs on the same machine, in one run.

    python benches/compare.py                        everything for the 1B shape; writes benches/results/<date>-<cpu>.md
    python benches/compare.py --shape 0.5B --rounds 5

Random weights of a real shape are written once as a Hugging Face directory and as GGUF; kbit quantises the one, llama-quantize the
other. Engines run one after the other in every round, so that a slow minute of the machine hits all of them, and the best round
counts for each. A peer that is missing or fails ends the run. Use an idle machine: it needs about 20 GB of disk and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import peers
import shapes

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
NEAREST = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_0", 5: "Q5_K_M", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}
SAME_FILE = ("Q4_0", "Q4_K_M", "Q6_K", "Q8_0")
BATCHES = (1, 2, 4, 8, 16)
DEPTH = 4096

# One measurement of kbit in a fresh process, as a peer's program is: argv = model, threads, what.
CHILD = """
import json, resource, sys, time
start = time.perf_counter()
import numpy as np, kbit
path, threads, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
model = kbit.load(path, threads=threads, context=8192)
loaded = time.perf_counter()
engine, rng = model.engine, np.random.default_rng(1)
def run(prompts, new):
    requests = [engine.submit(rng.integers(300, 2000, n, dtype=np.uint32), max_new_tokens=new, temperature=0.0) for n in prompts]
    made = [0] * len(requests)
    for i, r in enumerate(requests):
        while (tokens := r.wait(10.0)) is not None:
            made[i] += len(tokens)
    assert made == [new] * len(requests), made
    return requests
out = {"load": loaded - start, "bits": model.bits_per_weight, "nbytes": model.nbytes}
r = run([8], 1)
out["first_token"] = time.perf_counter() - start
if what == "speed":
    run([64], 8)
    out["prefill"] = 512 / run([512], 1)[0].prompt_seconds
    out["decode"] = 128 / run([8], 129)[0].decode_seconds
elif what == "depth":
    near = run([DEPTH], 129)[0]
    far = run([DEPTH + 512], 1)[0]
    out["decode"] = 128 / near.decode_seconds
    out["prefill"] = 512 / (far.prompt_seconds - near.prompt_seconds)
elif what.startswith("batch"):
    n = int(what[5:])
    run([16] * n, 4)
    out["decode"] = max(64 * n / max(r.decode_seconds for r in run([16] * n, 65)) for _ in range(2))
out["isa"], out["peak"] = kbit.isa(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
out["cache"] = engine.stats().get("cache_bytes", 0)
print(json.dumps(out))
""".replace("DEPTH", str(DEPTH))


def kbit(model: Path, threads: int, what: str, isa: str = "") -> dict[str, float]:
    """One measurement in a process of its own."""
    env = os.environ | {"KBIT_ISA": isa}
    done = subprocess.run([sys.executable, "-c", CHILD, model, str(threads), what], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"compare: kbit failed on {model} ({what}, {isa or 'best'}):\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@dataclass
class Row:
    """One engine on one file: the best of every figure over the rounds."""

    name: str
    measure: Callable[[], dict[str, float]]
    best: dict[str, float] = field(default_factory=dict)

    def again(self) -> None:
        """Another round; rates keep their largest value, times and sizes their smallest."""
        for key, value in self.measure().items():
            if isinstance(value, str):
                continue
            small = key in {"load", "first_token", "peak"}
            old = self.best.get(key)
            self.best[key] = value if old is None else (min if small else max)(old, value)


def interleave(rows: list[Row], rounds: int, title: str) -> None:
    """Run every row once a round."""
    for turn in range(rounds):
        for row in rows:
            print(f"\r\x1b[K{title}: round {turn + 1}/{rounds}, {row.name}", end="", file=sys.stderr, flush=True)
            row.again()
    print("\r\x1b[K", end="", file=sys.stderr)


def machine(threads: int) -> list[str]:
    """Processor, instruction sets, compiler-independent facts for the head of the table."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    flags = set(next((line.split(":")[1].split() for line in info.splitlines() if line.startswith("flags")), []))
    wanted = ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_int8", "amx_bf16"]
    has, lacks = [f for f in wanted if f in flags], [f for f in wanted if f not in flags]
    return [f"{model}, {os.cpu_count()} cores, {threads} threads; has {' '.join(has)}; lacks {' '.join(lacks)}"]


def limits(threads: int) -> dict[str, float]:
    """Read bandwidth (GB/s) and integer peak (TOPS) as `kbit bench --limits` measures them."""
    out = subprocess.run([sys.executable, "-m", "kbit", "bench", "--limits", "--threads", str(threads), "--json"],
                         capture_output=True, text=True, check=True).stdout  # fmt: skip
    return dict(json.loads(out))


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(r) + " |" for r in rows), ""]


def main() -> None:
    """Run it."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--shape", choices=sorted(shapes.SHAPES), default="1B")
    ask.add_argument("--threads", type=int, default=min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--bits", type=int, nargs="*", default=list(WIDTHS), choices=WIDTHS)
    ask.add_argument("--only", nargs="*", choices=["widths", "files", "isas", "depth", "batch"], help="parts of the comparison; default: all")
    ask.add_argument("--cache", type=Path, default=ROOT / ".cache/compare", help="where peers and models are kept")
    ask.add_argument("--output", type=Path, help="default: benches/results/<date>-<shape>.md")
    args = ask.parse_args()
    parts = set(args.only or ["widths", "files", "isas", "depth", "batch"])
    threads, shape = args.threads, shapes.SHAPES[args.shape]

    peer = peers.get(args.cache, jobs=os.cpu_count() or 1)
    source = args.cache / args.shape
    subprocess.run([peer.python, "-c", "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import shapes; s = shapes.SHAPES[sys.argv[2]];"
                    "p = pathlib.Path(sys.argv[3]); shapes.write_directory(s, p); shapes.write_gguf(s, p.with_name(p.name + '-bf16.gguf'))",
                    str(Path(__file__).parent), args.shape, str(source)], check=True)  # fmt: skip
    gguf = source.with_name(source.name + "-bf16.gguf")
    saved = {}
    for bits in args.bits:
        saved[bits] = args.cache / f"{args.shape}-kbit{bits}"
        if not saved[bits].exists():
            subprocess.run([sys.executable, "-m", "kbit", "quantize", str(source), str(saved[bits]), "--bits", str(bits)], check=True)
    files = {kind: peers.quantised(peer, gguf, kind) for kind in sorted({*NEAREST.values(), *SAME_FILE})}

    before = limits(threads)
    report = [f"# {args.shape} shape, {datetime.date.today()}", "", *machine(threads), "", *peer.notes]
    report += [f"llama-cpp-python {peers.LLAMA_CPP}, mistral.rs {peers.MISTRALRS}; best of {args.rounds} interleaved rounds; tokens/s.", ""]
    bandwidth = before["read_gbs"]

    if "widths" in parts:
        ours = {b: Row(f"kbit {b} bits", lambda b=b: kbit(saved[b], threads, "speed")) for b in args.bits}
        theirs = {k: Row(f"llama.cpp {k}", lambda k=k: peers.llama_bench(peer.native, files[k], threads)) for k in sorted(set(NEAREST.values()))}
        extra = Row("llama.cpp Q4_K_M", lambda: peers.llama_bench(peer.native, files["Q4_K_M"], threads))
        rust = Row("mistral.rs Q4_K_M", lambda: peers.mistral(peer, files["Q4_K_M"], threads))
        interleave([*ours.values(), *theirs.values(), extra, rust], args.rounds, "widths")
        rows = []
        for b, row in ours.items():
            got, them = row.best, theirs[NEAREST[b]].best
            share = got["decode"] * got["nbytes"] / 1e9 / bandwidth
            rows.append([str(b), f"{got['bits']:.2f}", f"{got['nbytes'] / 1e6:.0f}", f"{got['prefill']:.0f}", f"{got['decode']:.1f}",
                         f"{100 * share:.0f} %", NEAREST[b], f"{files[NEAREST[b]].stat().st_size / 1e6:.0f}", f"{them['prefill']:.0f}",
                         f"{them['decode']:.1f}", f"{got['prefill'] / them['prefill']:.2f}", f"{got['decode'] / them['decode']:.2f}"])  # fmt: skip
        report += ["## Every width", "", f"Read bandwidth {bandwidth:.1f} GB/s. Prefill 512, decode 128.", ""]
        report += table(["k", "bits/weight", "MB", "prefill", "decode", "of bandwidth", "llama.cpp type", "MB", "prefill", "decode",
                         "prefill ratio", "decode ratio"], rows)  # fmt: skip
        if 4 in ours:
            four = ours[4].best
            report += table(["k = 4 against", "prefill", "decode", "prefill ratio", "decode ratio"],
                            [[r.name, f"{r.best['prefill']:.0f}", f"{r.best['decode']:.1f}", f"{four['prefill'] / r.best['prefill']:.2f}",
                              f"{four['decode'] / r.best['decode']:.2f}"] for r in (theirs["Q4_0"], extra, rust)])  # fmt: skip
        rows = [[f"kbit {b}", f"{r.best['load']:.2f}", f"{r.best['first_token']:.2f}", f"{r.best['peak'] / 1e6:.0f}",
                 f"{r.best['peak'] / (r.best['nbytes'] + r.best['cache']):.2f}"] for b, r in ours.items()]  # fmt: skip
        rows.append(["mistral.rs Q4_K_M", f"{rust.best['load']:.2f}", "", "", ""])
        report += ["## Load and memory", "", *table(["", "load s", "process start to first token s", "peak MB", "of weights + KV"], rows)]

    if "files" in parts:
        pairs = [(k, Row(f"kbit on {k}", lambda k=k: kbit(files[k], threads, "speed")),
                  Row(f"llama.cpp {k}", lambda k=k: peers.llama_bench(peer.native, files[k], threads))) for k in SAME_FILE]  # fmt: skip
        interleave([row for _, a, b in pairs for row in (a, b)], args.rounds, "same files")
        report += ["## The same GGUF file", ""]
        report += table(["type", "kbit prefill", "decode", "llama.cpp prefill", "decode", "prefill ratio", "decode ratio"],
                        [[k, f"{a.best['prefill']:.0f}", f"{a.best['decode']:.1f}", f"{b.best['prefill']:.0f}", f"{b.best['decode']:.1f}",
                          f"{a.best['prefill'] / b.best['prefill']:.2f}", f"{a.best['decode'] / b.best['decode']:.2f}"] for k, a, b in pairs])  # fmt: skip

    if "isas" in parts and 4 in args.bits:
        sets = json.loads(subprocess.run([sys.executable, "-c", "import kbit, json; print(json.dumps(kbit.isas()))"], capture_output=True,
                                         text=True, check=True).stdout)  # fmt: skip
        rows = []
        for isa, binaries, against in (("amx", peer.native, "llama.cpp"), ("avx512vbmi", peer.no_amx, "llama.cpp without AMX"),
                                       ("avx2", peer.avx2, "llama.cpp's AVX2 build")):  # fmt: skip
            if isa not in sets:
                rows.append([isa, "not measured", "", against, "", "", "", ""])
                continue
            a = Row(f"kbit {isa}", lambda isa=isa: kbit(saved[4], threads, "speed", isa))
            b = Row(against, lambda binaries=binaries: peers.llama_bench(binaries, files["Q4_0"], threads))
            interleave([a, b], args.rounds, "instruction sets")
            rows.append([isa, f"{a.best['prefill']:.0f}", f"{a.best['decode']:.1f}", against, f"{b.best['prefill']:.0f}", f"{b.best['decode']:.1f}",
                         f"{a.best['prefill'] / b.best['prefill']:.2f}", f"{a.best['decode'] / b.best['decode']:.2f}"])  # fmt: skip
        report += ["## Instruction sets, k = 4 against Q4_0", ""]
        report += table(["KBIT_ISA", "prefill", "decode", "against", "prefill", "decode", "prefill ratio", "decode ratio"], rows)

    if "depth" in parts and 4 in args.bits:
        a = Row("kbit 4", lambda: kbit(saved[4], threads, "depth"))
        b = Row("llama.cpp Q4_0, flash", lambda: peers.llama_bench(peer.native, files["Q4_0"], threads, depth=DEPTH, flash="on"))
        c = Row("llama.cpp Q4_0, no flash", lambda: peers.llama_bench(peer.native, files["Q4_0"], threads, depth=DEPTH, flash="off"))
        interleave([a, b, c], args.rounds, "depth")
        kv = shape.layers * shape.kv_heads * shape.head_dim * 2 * 2 * DEPTH
        share = a.best["decode"] * (a.best["nbytes"] + kv) / 1e9 / bandwidth
        report += [f"## At depth {DEPTH}", "", f"kbit decode reads weights and KV at {100 * share:.0f} % of the bandwidth.", ""]
        report += table(["", "prefill 512", "decode 128"], [[r.name, f"{r.best['prefill']:.0f}", f"{r.best['decode']:.1f}"] for r in (a, b, c)])

    if "batch" in parts and 4 in args.bits:
        ours = [Row(f"kbit batch {n}", lambda n=n: kbit(saved[4], threads, f"batch{n}")) for n in BATCHES]
        slow = [Row(f"kbit avx2 batch {n}", lambda n=n: kbit(saved[4], threads, f"batch{n}", "avx2")) for n in BATCHES]
        theirs = [Row(f"llama.cpp batch {n}", lambda n=n: {"decode": peers.llama_batch(peer.native, files["Q4_0"], threads, n)}) for n in BATCHES]
        interleave([row for group in zip(ours, slow, theirs, strict=True) for row in group], args.rounds, "batch")
        rates = lambda rows: [r.best["decode"] for r in rows]  # noqa: E731
        report += ["## Batched decode, k = 4 against Q4_0, total tokens/s (times a single sequence)", ""]
        report += table(["", *map(str, BATCHES)], [[name, *(f"{x:.0f} ({x / r[0]:.2f})" for x in r)] for name, r in
                        (("kbit", rates(ours)), ("kbit, KBIT_ISA=avx2", rates(slow)), ("llama.cpp Q4_0", rates(theirs)))])  # fmt: skip

    after = limits(threads)
    report += ["Read bandwidth after the run " + f"{after['read_gbs']:.1f} GB/s."]
    to = args.output or ROOT / f"benches/results/{datetime.date.today()}-{args.shape}.md"
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("\n".join(report) + "\n")
    print(to.read_text())


if __name__ == "__main__":
    main()

"""The engines kbit is compared with: llama.cpp (built from the source of llama-cpp-python), mistral.rs, PyTorch.

One that cannot be had ends the run; one that gives no measurement has `Failed`: a table is never silently shorter.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ours import BATCH_SECONDS, batch_steps

LLAMA_CPP = "0.3.36"
MISTRALRS = "0.9.5"
TORCH = "2.15.0"
BUILD = ["cmake==4.4.4", "ninja==1.13.2"]
PACKAGES = [
    f"mistralrs=={MISTRALRS}",
    f"torch=={TORCH}",
    "gguf==0.19.0",
    "tokenizers==0.23.3",
    "safetensors==0.8.0",
    "numpy",
]
# Plain AVX2: what llama.cpp runs on a processor without AVX-512, against KBIT_ISA=avx2.
AVX2 = [
    "-DGGML_NATIVE=OFF",
    "-DGGML_AVX=ON",
    "-DGGML_AVX2=ON",
    "-DGGML_FMA=ON",
    "-DGGML_F16C=ON",
    "-DGGML_BMI2=ON",
]
NATIVE = ["-DGGML_NATIVE=ON"]
PROGRAMS = [
    *("llama-bench", "llama-batched-bench", "llama-quantize"),
    *("llama-completion", "llama-tokenize"),  # beside_llama.py
]


@dataclass(frozen=True)
class Peers:
    """Where the built peers are."""

    python: Path
    native: Path
    avx2: Path
    no_amx: Path
    notes: tuple[str, ...]


class Failed(Exception):
    """An engine gave no measurement; the text says why."""


@dataclass(frozen=True)
class Ran:
    """A program that ended well."""

    output: str
    seconds: float
    peak: int
    """Bytes resident at most."""


def run(*command: str | Path, timeout: float, env: dict[str, str] | None = None) -> Ran:
    """Runs a program to its end, or to `timeout` seconds.

    Raises:
        Failed: It cannot be started, takes longer, or ends with an error.
    """
    words = [str(c) for c in command]
    name = " ".join(word for word in words if "\n" not in word)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | (env or {}),
            )
        except OSError as error:
            raise Failed(f"{name}: {error}") from None
        ended = threading.Timer(timeout, child.kill)
        ended.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        finally:
            ended.cancel()
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if seconds >= timeout:
            raise Failed(f"{name} took more than {timeout:g} s")
        out.seek(0)
        text = out.read()
        if child.returncode:
            err.seek(0)
            raise Failed(
                f"{name} ended with {child.returncode}: {text[-1000:]}{err.read()[-2000:]}"
            )
        return Ran(text, seconds, usage.ru_maxrss * 1024)


def _run(*command: str | Path) -> str:
    return run(*command, timeout=7200).output


def _has_amx() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_int8" in info.read_text()


def _guard_tile_configuration(source: Path) -> bool:
    """Put a compiler barrier before `_tile_loadconfig`: gcc 12 leaves it in registers and the load faults."""
    file = source / "ggml/src/ggml-cpu/amx/mmq.cpp"
    text = file.read_text()
    barrier = r'\n\1asm volatile("" ::: "memory");\n\1_tile_loadconfig(&tc);'
    guarded = re.sub(r"\n([ \t]*)_tile_loadconfig\(&tc\);", barrier, text)
    if "asm volatile" not in text:
        file.write_text(guarded)
    return "asm volatile" in file.read_text()


def _compile(
    source: Path, to: Path, flags: list[str], tools: Path, jobs: int, targets: Sequence[str]
) -> Path:
    """Builds `targets` and returns the folder they are in; every library is looked for beside who needs it."""
    cmake, ninja = tools / "cmake", tools / "ninja"
    _run(
        cmake, "-S", source, "-B", to, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN",
        "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", *flags,
    )  # fmt: skip
    _run(ninja, "-C", to, f"-j{jobs}", *targets)
    return to / "bin"


def _native(source: Path, to: Path, tools: Path, jobs: int) -> Path:
    """The programs, for this processor."""
    if not all((to / "bin" / name).exists() for name in PROGRAMS):
        _compile(source, to, NATIVE, tools, jobs, ["ggml-cpu", *PROGRAMS])
    return to / "bin"


def _variant(source: Path, base: Path, to: Path, flags: list[str], tools: Path, jobs: int) -> Path:
    """The programs of `base` with the CPU library built under other flags."""
    if not (to / "done").exists():
        built = _compile(source, to / "build", flags, tools, jobs, ["ggml-cpu"])
        shutil.rmtree(to / "bin", ignore_errors=True)  # of a run that was cut short
        kept = shutil.ignore_patterns("libggml-cpu*")
        shutil.copytree(base, to / "bin", symlinks=True, ignore=kept)
        for library in built.glob("libggml-cpu*"):
            shutil.copy2(library, to / "bin" / library.name, follow_symlinks=False)
        (to / "done").touch()
    return to / "bin"


@dataclass(frozen=True)
class Llama:
    """Where llama.cpp is."""

    tools: Path
    source: Path
    native: Path
    notes: tuple[str, ...]


def llama(cache: Path, jobs: int) -> Llama:
    """Build llama.cpp under `cache` (minutes the first time)."""
    cache.mkdir(parents=True, exist_ok=True)
    tools = cache / "venv/bin"
    if not tools.exists():
        _run(sys.executable, "-m", "venv", cache / "venv")
    _run(tools / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *BUILD)
    archive = cache / f"llama_cpp_python-{LLAMA_CPP}.tar.gz"
    if not archive.exists():
        _run(tools / "python", "-m", "pip", "download", "-q", "--no-deps",
             "-d", cache, f"llama-cpp-python=={LLAMA_CPP}")  # fmt: skip
    source = cache / f"llama_cpp_python-{LLAMA_CPP}" / "vendor/llama.cpp"
    if not source.exists():
        name = archive.name.removesuffix(".tar.gz")
        part = cache / "part"  # not a whole source before it has its name
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
        (part / name).rename(cache / name)
        part.rmdir()
    notes = []
    if _has_amx():
        if not _guard_tile_configuration(source):
            sys.exit(
                "peers: llama.cpp's AMX source has changed: the barrier before _tile_loadconfig found no place"
            )
        notes.append(
            "llama.cpp's AMX code got a compiler barrier before _tile_loadconfig (gcc 12 drops the store)"
        )
    return Llama(tools, source, _native(source, cache / "native", tools, jobs), tuple(notes))


def get(cache: Path, jobs: int) -> Peers:
    """Install and build every peer under `cache` (minutes the first time)."""
    built = llama(cache, jobs)
    tools, source, native = built.tools, built.source, built.native
    _run(tools / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES)
    avx2 = _variant(source, native, cache / "avx2", AVX2, tools, jobs)
    no_amx = native
    if _has_amx():
        off = "-mno-amx-tile -mno-amx-int8"  # stronger than -march=native, wherever it stands
        flags = [*NATIVE, f"-DCMAKE_C_FLAGS={off}", f"-DCMAKE_CXX_FLAGS={off}"]
        no_amx = _variant(source, native, cache / "no-amx", flags, tools, jobs)
    return Peers(tools / "python", native, avx2, no_amx, built.notes)


def quantised(peers: Peers, source: Path, kind: str) -> Path:
    """`source` (GGUF) as type `kind`, written once."""
    to = source.with_name(source.name.replace("-bf16.gguf", f"-{kind}.gguf"))
    if not to.exists():
        part = source.with_name(
            "writing.part"
        )  # a type in the name would be taken for the argument
        _run(peers.native / "llama-quantize", "--allow-requantize", source, part, kind)
        part.rename(to)
    return to


def llama_bench(
    binaries: Path,
    model: Path,
    threads: int,
    timeout: float,
    *,
    depth: int = 0,
    flash: str = "auto",
    prompts: int = 1,
    turns: int = 2,
) -> dict[str, float]:
    """Tokens/s of 512 tokens and of 128 generated ones after `depth` tokens.

    The best of so many `prompts` and `turns` of decode, as kbit's are, after a warm-up.
    """
    out: dict[str, float] = {}
    peak = 0
    for name, prompt, new, often in (("prefill", 512, 0, prompts), ("decode", 0, 128, turns)):
        ran = run(binaries / "llama-bench", "-m", model, "-t", str(threads), "-p", str(prompt), "-n", str(new),
                  "-d", str(depth), "-fa", flash, "-r", str(often), "-o", "json", timeout=timeout)  # fmt: skip
        out[name] = max(json.loads(ran.output)[0]["samples_ts"])
        peak = max(peak, ran.peak)
    return out | {"peak": peak}


def llama_start(binaries: Path, model: Path, threads: int, timeout: float) -> dict[str, float]:
    """Seconds of a process that loads `model` and reads 8 token ids."""
    ran = run(binaries / "llama-bench", "-m", model, "-t", str(threads), "-p", "8", "-n", "0", "-r", "1", "--no-warmup",
              timeout=timeout)  # fmt: skip
    return {"first_token": ran.seconds}


def llama_batch(
    binaries: Path, model: Path, threads: int, batches: Sequence[int], turns: int, timeout: float
) -> dict[str, float]:
    """Generated tokens/s of each number of sequences together, the best of `turns`, as batch1, batch2 and so on."""

    def rates(steps: int, batches: Sequence[int]) -> list[tuple[int, float]]:
        ran = run(binaries / "llama-batched-bench", "-m", model, "-t", str(threads), "-c", str(max(batches) * 160),
                  "-npp", "16", "-ntg", str(steps), "-npl", ",".join(map(str, batches)), "--output-format", "jsonl",
                  timeout=timeout)  # fmt: skip
        rows = [json.loads(line) for line in ran.output.splitlines() if line.startswith("{")]
        return [(row["pl"], float(row["speed_tg"])) for row in rows]

    # The first number twice: what reads the weights first is no measure.
    before = dict(rates(4, (batches[0], *batches)))
    best = {
        n: max(rate for _, rate in rates(batch_steps(before[n], n), [n] * turns)) for n in batches
    }
    return {f"batch{n}": rate for n, rate in best.items()}


# Prompts share no beginning and nothing is kept of them, so that every one is read whole. Seconds are those of its own
# usage record. Sequences together are choices of one request, as a Runner takes one at a time; their prompt is one
# token, as prompts of several are an error in batches on CPUs ("input tensor is not contiguous").
MISTRAL = """
import json, resource, sys, time
from mistralrs import CompletionRequest, Runner, Which
path, what, started, prompts, turns, batches, seconds = json.loads(sys.argv[1])
folder, _, file = path.rpartition("/")
start = time.perf_counter()
which = Which.GGUF(tok_model_id=None, quantized_model_id=folder, quantized_filename=file)
runner = Runner(which=which, prefix_cache_n=0)
out = {"load": time.perf_counter() - start}
def ask(first, tokens, new, n=1):
    text = " ".join(f"w{(first + i) % 1500}" for i in range(tokens))
    request = CompletionRequest(
        prompt=text, model="default", max_tokens=new, temperature=0.0, n_choices=n, best_of=n)
    answer = runner.send_completion_request(request)
    usage = answer.usage
    got = usage.prompt_tokens, usage.completion_tokens, len(answer.choices)
    assert abs(got[0] - tokens) < 4 and got[1:] == (new, n), got
    return usage
ask(1, 8, 1)
out["first_token"] = time.time() - started
def rate(tokens, seconds):
    return tokens / max(seconds, 1e-3)  # it counts in milliseconds
if what == "speed":
    ask(100, 64, 8)
    ask(150, 512, 1)
    read = [ask(200 + 10 * n, 512, 1).total_prompt_time_sec for n in range(prompts)]
    out["prefill"] = rate(512, min(read))
    out["decode"] = max(rate(128, ask(n, 8, 129).total_completion_time_sec) for n in range(300, 300 + 50 * turns, 50))
elif what == "batch":
    def batch(first, n, steps):
        return rate(n * steps, ask(first, 1, 1 + steps, n).total_completion_time_sec)
    best = {n: batch(100 + n, n, 4) for n in batches}
    steps = {n: max(4, min(64, round(seconds * speed / n))) for n, speed in best.items()}
    for i, n in enumerate(batches * turns):
        best[n] = max(best[n], batch(600 + i, n, steps[n]))
    out |= {f"batch{n}": speed for n, speed in best.items()}
else:
    near, far = ask(400, 4096, 129), ask(500, 4096 + 512, 1)
    out |= {"near": near.total_prompt_time_sec, "far": far.total_prompt_time_sec}
    out["decode"] = rate(128, near.total_completion_time_sec)
out["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(out))
"""


def mistral(
    peers: Peers,
    model: Path,
    threads: int,
    what: str,
    timeout: float,
    *,
    prompts: int = 1,
    turns: int = 1,
    batches: Sequence[int] = (),
) -> dict[str, float]:
    """Tokens/s of mistral.rs on a GGUF file: `what` is speed or batch (the best of so many) or depth (decode once).

    Depth also gives the seconds of a prompt of 4096 tokens (`near`) and of 512 more (`far`); batch is as `llama_batch`.
    """
    env = {
        "RAYON_NUM_THREADS": str(threads),
        "CANDLE_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    asked = [str(model), what, time.time(), prompts, turns, list(batches), BATCH_SECONDS]
    ran = run(peers.python, "-c", MISTRAL, json.dumps(asked), timeout=timeout, env=env)
    lines = [line for line in ran.output.splitlines() if line.startswith("{")]
    if not lines:
        raise Failed(f"mistral.rs on {model.name} printed no result: {ran.output[-1000:]}")
    return dict(json.loads(lines[-1]))


def torch(
    peers: Peers, model: Path, threads: int, prompts: int, timeout: float
) -> dict[str, float]:
    """Tokens/s of PyTorch in bfloat16 on a Hugging Face directory, the best of so many prompts."""
    script = Path(__file__).with_name("beside_torch.py")
    ran = run(peers.python, script, model, str(threads), str(prompts), timeout=timeout)
    return dict(json.loads(ran.output.splitlines()[-1]))

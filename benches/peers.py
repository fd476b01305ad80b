"""The engines kbit is compared with: llama.cpp (built from the llama-cpp-python source package) and mistral.rs (its wheel).

A peer that cannot be had raises: a comparison without it fails rather than growing a shorter table.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

LLAMA_CPP = "0.3.36"
MISTRALRS = "0.9.5"
PACKAGES = ["cmake==4.4.4", "ninja==1.13.2", f"mistralrs=={MISTRALRS}", "gguf==0.19.0", "tokenizers", "safetensors", "numpy"]
# Plain AVX2: what llama.cpp runs on a processor without AVX-512, against KBIT_ISA=avx2.
AVX2 = ["-DGGML_NATIVE=OFF", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON"]
NATIVE = ["-DGGML_NATIVE=ON"]


@dataclass(frozen=True)
class Peers:
    """Where the built peers are."""

    python: Path
    native: Path
    avx2: Path
    no_amx: Path
    notes: tuple[str, ...]


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"peers: {' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def _has_amx() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_int8" in info.read_text()


def _guard_tile_configuration(source: Path) -> bool:
    """Put a compiler barrier before `_tile_loadconfig`: gcc 12 leaves the configuration in registers and the load faults."""
    file = source / "ggml/src/ggml-cpu/amx/mmq.cpp"
    text = file.read_text()
    guarded = re.sub(r"\n(\s*)_tile_loadconfig\(&tc\);", r'\n\1asm volatile("" ::: "memory");\n\1_tile_loadconfig(\&tc);', text)
    if "asm volatile" not in text:
        file.write_text(guarded)
    return "asm volatile" in file.read_text()


def _build(source: Path, to: Path, flags: list[str], tools: Path, jobs: int) -> Path:
    """Build the programs into `to`/bin with the shared library of one instruction set."""
    env_cmake, ninja = tools / "cmake", tools / "ninja"
    if not (to / "done").exists():
        _run(
            env_cmake, "-S", source, "-B", to, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_SHARED_LIBS=ON", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN", "-DLLAMA_CURL=OFF",
            "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", *flags,
        )  # fmt: skip
        _run(ninja, "-C", to, f"-j{jobs}", "ggml-cpu", "llama-bench", "llama-batched-bench", "llama-quantize")
        (to / "done").touch()
    return to / "bin"


def _variant(source: Path, base: Path, to: Path, flags: list[str], tools: Path, jobs: int) -> Path:
    """The programs of `base` with the CPU library built under other flags."""
    if not (to / "done").exists():
        build = to / "build"
        _run(
            tools / "cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
            "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
            "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN", *flags,
        )  # fmt: skip
        _run(tools / "ninja", "-C", build, f"-j{jobs}", "ggml-cpu")
        shutil.copytree(base, to / "bin", symlinks=True, dirs_exist_ok=True)
        for library in (build / "bin").glob("libggml-cpu*"):
            (to / "bin" / library.name).unlink(missing_ok=True)
            shutil.copy2(library, to / "bin" / library.name, follow_symlinks=False)
        (to / "done").touch()
    return to / "bin"


def get(cache: Path, jobs: int) -> Peers:
    """Install and build every peer under `cache` (minutes the first time)."""
    cache.mkdir(parents=True, exist_ok=True)
    tools = cache / "venv/bin"
    if not tools.exists():
        _run(sys.executable, "-m", "venv", cache / "venv")
    _run(tools / "python", "-m", "pip", "install", "-q", *PACKAGES)
    archive = cache / f"llama_cpp_python-{LLAMA_CPP}.tar.gz"
    if not archive.exists():
        _run(tools / "python", "-m", "pip", "download", "-q", "--no-deps",
             "-d", cache, f"llama-cpp-python=={LLAMA_CPP}")  # fmt: skip
    source = cache / f"llama_cpp_python-{LLAMA_CPP}" / "vendor/llama.cpp"
    if not source.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(cache, filter="data")
    notes = []
    if _has_amx():
        if not _guard_tile_configuration(source):
            sys.exit("peers: llama.cpp's AMX source has changed: the barrier before _tile_loadconfig found no place")
        notes.append("llama.cpp's AMX code got a compiler barrier before _tile_loadconfig (gcc 12 drops the store)")
    native = _build(source, cache / "native", NATIVE, tools, jobs)
    avx2 = _variant(source, native, cache / "avx2", AVX2, tools, jobs)
    no_amx = native
    if _has_amx():
        no_amx = _variant(source, native, cache / "no-amx", [*NATIVE, "-DGGML_AMX_TILE=OFF", "-DGGML_AMX_INT8=OFF",
                          "-DCMAKE_CXX_FLAGS=-mno-amx-tile -mno-amx-int8", "-DCMAKE_C_FLAGS=-mno-amx-tile -mno-amx-int8"],
                          tools, jobs)  # fmt: skip
    return Peers(tools / "python", native, avx2, no_amx, tuple(notes))


def quantised(peers: Peers, source: Path, kind: str) -> Path:
    """`source` (GGUF) as type `kind`, written once."""
    to = source.with_name(source.name.replace("-bf16.gguf", f"-{kind}.gguf"))
    if not to.exists():
        part = source.with_name("writing.part")  # a type in the name would be taken for the argument
        _run(peers.native / "llama-quantize", "--allow-requantize", source, part, kind)
        part.rename(to)
    return to


def llama_bench(binaries: Path, model: Path, threads: int, *, depth: int = 0, flash: str = "auto") -> dict[str, float]:
    """Tokens/s of 512 prompt tokens and of 128 generated ones after `depth` tokens, one repetition after a warm-up."""
    out = _run(binaries / "llama-bench", "-m", model, "-t", str(threads), "-p", "512", "-n", "128", "-d", str(depth), "-fa", flash,
               "-r", "1", "-o", "json")  # fmt: skip
    rows = json.loads(out)
    return {
        "prefill": next(r["avg_ts"] for r in rows if r["n_prompt"]),
        "decode": next(r["avg_ts"] for r in rows if r["n_gen"]),
    }


def llama_batch(binaries: Path, model: Path, threads: int, batch: int) -> float:
    """Generated tokens/s of `batch` sequences together."""
    out = _run(binaries / "llama-batched-bench", "-m", model, "-t", str(threads), "-c", str(batch * 160), "-npp", "16", "-ntg", "64",
               "-npl", str(batch), "--output-format", "jsonl")  # fmt: skip
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return float(rows[-1]["speed_tg"])


MISTRAL = """
import json, sys, time
from mistralrs import Runner, Which, CompletionRequest
path, prompt_tokens, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
start = time.perf_counter()
folder, _, file = path.rpartition("/")
runner = Runner(which=Which.GGUF(tok_model_id=None, quantized_model_id=folder, quantized_filename=file))
load = time.perf_counter() - start
ask = lambda text, n: runner.send_completion_request(CompletionRequest(prompt=text, model="default", max_tokens=n, temperature=0.0))
words = " ".join(f"w{i}" for i in range(prompt_tokens - 1))
ask("w1", 2)
prefill = ask(words, 1).usage
decode = ask("w1 w2", new).usage
print(json.dumps({"prefill": prefill.prompt_tokens / prefill.total_prompt_time_sec, "prompt_tokens": prefill.prompt_tokens,
                  "decode": (decode.completion_tokens - 1) / decode.total_completion_time_sec, "tokens": decode.completion_tokens, "load": load}))
"""


def mistral(peers: Peers, model: Path, threads: int) -> dict[str, float]:
    """Tokens/s of mistral.rs on a GGUF file, from its own usage record."""
    env = os.environ | {"RAYON_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([peers.python, "-c", MISTRAL, model, "512", "128"], env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"peers: mistral.rs failed on {model.name} ({done.returncode}): {done.stderr[-1500:]}")
    return dict(json.loads(lines[-1]))

"""One measurement of kbit in a process of its own, as a peer's program is; `compare.py` starts it.

    python benches/ours.py MODEL THREADS WHAT STARTED

`WHAT` is read (the bytes of a saved model into fresh memory, what loading is compared with), start (loading, a token
and a prompt), speed, depth or batch; `STARTED` is the clock when the process was asked for. Prints one line of JSON:
seconds, tokens/s at best, bytes, and `beside`: tokens for every byte that the machine could have read in plain loops
between two decodes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

DEPTH = 4096
BATCHES = (1, 2, 4, 8, 16)
TURNS = 4
"""Decodes of every engine in one round: a shared machine reads memory at other speeds from second to second."""
PROMPTS = 3
"""Prompts, likewise: it multiplies at other speeds too."""
BATCH_TURNS = 4
"""The same, of every number of sequences."""
BATCH_SECONDS = 1.0
"""How long such a turn lasts, whatever the number: the best of turns of seven seconds and the best of those of one have
met different machines where others use it too."""


def batch_steps(rate: float, sequences: int) -> int:
    """Tokens of each sequence in a turn, where all together made `rate` tokens/s before."""
    return max(4, min(64, round(BATCH_SECONDS * rate / sequences)))


def read(path: Path) -> dict[str, float]:
    """Reads the weights of a saved model with one call."""
    start = time.perf_counter()
    size = np.fromfile(path / "model.safetensors", np.uint8).size
    return {"read": time.perf_counter() - start, "file": size}


def measure(path: Path, threads: int, what: str, started: float) -> dict[str, float | str]:
    """Loads `path` and measures it."""
    import kbit
    from kbit import _core

    start = time.perf_counter()
    model = kbit.load(path, threads=threads, context=8192)
    out: dict[str, float | str] = {"load": time.perf_counter() - start}
    out |= {"bits": model.bits_per_weight, "nbytes": model.nbytes}
    engine, rng = model.engine, np.random.default_rng(1)

    def submit(prompt: int, new: int):  # noqa: ANN202
        ids = rng.integers(300, 2000, prompt, dtype=np.uint32)
        return engine.submit(ids, max_new_tokens=new, temperature=0.0)

    def run(prompts: list[int], new: int):  # noqa: ANN202
        requests = [submit(prompt, new) for prompt in prompts]
        made = [0] * len(requests)
        for i, request in enumerate(requests):
            while (tokens := request.wait(10.0)) is not None:
                made[i] += len(tokens)
        assert made == [new] * len(requests), made
        return requests

    def batch(n: int, steps: int) -> float:
        """Tokens/s of so many sequences, by each one's own: the first may have waited for the prompts of others."""
        return sum(steps / r.decode_seconds for r in run([16] * n, 1 + steps))

    def prefill_at_depth() -> float:
        """Tokens/s of the 512 tokens behind DEPTH others: the clock starts when the engine has read those."""
        before, at = engine.stats()["prompt_tokens"], 0.0
        request = submit(DEPTH + 512, 1)
        while request.wait(0.002) is not None:
            if not at and engine.stats()["prompt_tokens"] - before >= DEPTH:
                at = time.perf_counter()
        assert at, "the prompt was read in one piece"
        return 512 / (time.perf_counter() - at)

    run([8], 1)
    out["first_token"] = time.time() - started
    # Ids of the prompt that is decoded behind, and how often before the machine is measured.
    context, turns = (8, TURNS // 2) if what == "speed" else (DEPTH, 1)
    rates = []

    def decode() -> None:
        rates.extend(128 / run([context], 129)[0].decode_seconds for _ in range(turns))

    if what == "start":
        run([512], 1)
    elif what == "speed":
        run([64], 8)
        run([512], 1)  # every engine has read a prompt of that size before
        out["prefill"] = max(512 / run([512], 1)[0].prompt_seconds for _ in range(PROMPTS))
        decode()
    elif what == "depth":
        decode()
        out["prefill"] = prefill_at_depth()
    elif what == "batch":
        best = {n: batch(n, 4) for n in BATCHES}
        steps = {n: batch_steps(rate, n) for n, rate in best.items()}
        for n in BATCHES * BATCH_TURNS:
            best[n] = max(best[n], batch(n, steps[n]))
        out |= {f"batch{n}": rate for n, rate in best.items()}
    out["isa"] = kbit.isa()
    out["resident"] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    out["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if rates:
        # After memory was looked at: what is read here is 1 GiB of its own.
        bandwidth = _core.limits(threads=threads)["read_bytes_per_second"]
        decode()
        around = rates[turns - 1 : turns + 1]
        out |= {"decode": max(rates), "beside": sum(around) / 2 / bandwidth}
    return out


def main() -> None:
    """Run it."""
    path, threads, what, started = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        float(sys.argv[4]),
    )
    print(json.dumps(read(path) if what == "read" else measure(path, threads, what, started)))


if __name__ == "__main__":
    main()

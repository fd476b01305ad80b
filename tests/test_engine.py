"""The engine under `kbit`: against an oracle in NumPy, alone and in crowds, cancelled, forked, out of memory."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny
from engines import finish, load, parts
from kbit import _core

pytestmark = pytest.mark.core
DEVICES = ["cpu", "reference"]


def generate(engine, ids, **options):
    return [t.id for t in finish(engine.submit(np.array(ids, np.uint32), **options))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny"), text=False)


@pytest.fixture(scope="module", params=DEVICES)
def engine(request, directory):
    return load(directory, device=request.param, kv="f32")


# Against transformers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "llama_rope3"])
def test_goldens(shared, name, device):
    golden = load_file(shared(f"golden/{name}/golden.safetensors"))
    engine = load(shared(f"golden/{name}"), device=device, kv="f32")
    for row, ids in enumerate(golden["input_ids"].astype(np.uint32)):
        out = engine.forward(ids, hidden_states=True, attentions=True)
        expected = golden["logits"][row]
        assert np.abs(out["logits"] - expected).max() < 1e-4 * expected.std()
        assert np.abs(out["hidden_states"][1] - golden["hidden_1"][row]).max() < 1e-4
        assert np.abs(out["hidden_states"][-1] - golden["hidden_last"][row]).max() < 1e-4
        assert np.abs(out["attentions"][0] - golden["attention_0"][row]).max() < 1e-4
        assert np.abs(engine.score(ids) - golden["token_logprobs"][row]).max() < 1e-4
        greedy = generate(engine, ids, max_new_tokens=40, temperature=0.0)
        assert [*ids, *greedy] == golden["greedy"][row].tolist()


# The sampler, written again


def philox(counter, key):
    """Philox 4x32-10 in Python's integers."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def draw(logits, seen, step, *, temperature, top_k, top_p, min_p, repetition_penalty, seed):
    """docs/numerics.md, section 7."""
    logits = logits.copy()
    for i in set(seen):
        penalty = np.float32(repetition_penalty)
        logits[i] = logits[i] * penalty if logits[i] < 0 else logits[i] / penalty
    order = np.lexsort((np.arange(len(logits)), -logits))
    if temperature == 0:
        return int(order[0])
    order = order[: top_k or None]
    scaled = (logits[order] / np.float32(temperature)).astype(np.float64)
    p = np.exp(scaled - scaled[0])
    if top_p < 1:
        before = np.cumsum(p) - p
        order, p = (
            order[before < np.float32(top_p) * p.sum()],
            p[before < np.float32(top_p) * p.sum()],
        )
    order, p = order[p >= np.float32(min_p)], p[p >= np.float32(min_p)]
    low, high, *_ = philox(step, seed)
    target = ((high << 32 | low) >> 11) / 2**53 * p.sum()
    return int(order[min(np.searchsorted(np.cumsum(p), target, side="right"), len(p) - 1)])


SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_draws_are_those_of_the_oracle(engine, sampling, seed):
    plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": seed}
    sampling = plain | sampling
    ids = [1, 2, 3, 200]
    got = generate(engine, ids, max_new_tokens=12, **sampling)
    for step, token in enumerate(got):
        logits = engine.forward(np.array(ids, np.uint32))["logits"][-1]
        assert draw(logits, ids, step, **sampling) == token
        ids.append(token)


def test_log_probabilities(engine):
    ids = np.array([5, 6, 7], np.uint32)
    tokens = finish(engine.submit(ids, max_new_tokens=5, temperature=1.5, seed=3, logprobs=4))
    everything = np.array([*ids, *(t.id for t in tokens)], np.uint32)
    scores = engine.score(everything, 3)
    assert [t.logprob for t in tokens] == scores.tolist()
    logits = engine.forward(everything)["logits"].astype(np.float64)
    logs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    logs -= logits.max(1, keepdims=True)
    for row, token in zip(logs[2:], tokens, strict=False):
        assert [i for i, _ in token.top] == np.argsort(-row, kind="stable")[:4].tolist()
        assert np.allclose([p for _, p in token.top], np.sort(row)[::-1][:4], atol=1e-5)
    without = finish(engine.submit(ids, max_new_tokens=5, temperature=1.5, seed=3))
    assert [t.id for t in without] == [t.id for t in tokens]
    assert all(t.logprob is None and t.top == [] for t in without)


# The CPU device against plain loops: every bit


def agree(spec, weights, **options):
    """Logits, hidden states, scores and tokens of both devices are equal."""
    ids = np.array([(i * i + 3 * i) % 250 for i in range(90)], np.uint32)
    found = []
    for device in DEVICES:
        engine = _core.Engine(spec, weights, device=device, **options)
        out = engine.forward(ids, hidden_states=True)
        tokens = generate(engine, ids[:20], max_new_tokens=20, temperature=0.8, seed=5)
        found.append((out["logits"], out["hidden_states"], engine.score(ids), tokens))
        assert np.isfinite(out["logits"]).all()
    (a, b) = found
    assert np.array_equal(a[0], b[0])
    assert all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    assert np.array_equal(a[2], b[2])
    assert a[3] == b[3]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_devices_agree_at_every_width(directory, bits, activations):
    spec, weights = parts(directory)
    for name, weight in weights.items():
        if len(weight.shape) == 2:
            weights[name] = _core.quantize(weight.dequantize(), bits)
    agree(spec, weights, activations=activations)


@pytest.mark.parametrize("kv", ["f32", "f16", "bf16", "int8"])
def test_devices_agree_with_every_cache(directory, kv):
    agree(*parts(directory), kv=kv)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    "name",
    ["gemma2", "gpt2", "gpt_neox", "mixtral", "opt", "phi3", "qwen2", "qwen3", "llama_rope3"],
)
def test_devices_agree_on_every_architecture(shared, name, bits):
    spec, weights = parts(shared(f"golden/{name}"))
    for key, weight in weights.items():
        if bits and len(weight.shape) == 2 and not key.endswith("positions.weight"):
            weights[key] = _core.quantize(weight.dequantize(), bits)
    agree(spec, weights)


# The same whatever happens around it


def wishes(i):
    """Request number i: every length, every kind of sampling."""
    ids = np.array([(7 * i + j * j) % 250 for j in range(1 + 11 * i % 60)], np.uint32)
    return ids, SAMPLINGS[i % len(SAMPLINGS)] | {"seed": i, "max_new_tokens": 10 + i % 7}


def test_sixteen_threads_get_what_each_gets_alone(engine):
    alone = [generate(engine, ids, **options) for ids, options in map(wishes, range(48))]
    found = [None] * 48

    def caller(first):
        for i in range(first, 48, 16):
            ids, options = wishes(i)
            found[i] = generate(engine, ids, **options)

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    stats = engine.stats()
    assert stats["running"] == stats["waiting"] == stats["cache_bytes"] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_results_do_not_depend_on_the_batch_or_the_room(directory, device):
    small = load(directory, device=device, kv="f32", max_batch=1)
    expected = [generate(small, w[0], **w[1]) for w in map(wishes, range(8))]
    # Room for two or three of these requests, not for eight: one token is 2 layers x (keys, values) x 32 f32; the
    # CPU device gives memory to sequences in pages of 256 tokens.
    room = 512 * (160 if device == "reference" else 3 * 256)
    tight = load(directory, device=device, kv="f32", max_batch=8, cache_bytes=room)
    requests = [tight.submit(w[0], **w[1]) for w in map(wishes, range(8))]
    assert [[t.id for t in finish(r)] for r in requests] == expected
    assert tight.stats()["preemptions"] > 0


def test_the_context_ends_a_request(engine):
    room = engine.context
    assert room == tiny.CONFIG["max_position_embeddings"]
    request = engine.submit(np.ones(room - 3, np.uint32), max_new_tokens=50)
    assert (len(finish(request)), request.finish_reason) == (3, "context")
    with pytest.raises(_core.ContextOverflowError, match=f"{room} tokens .* context of {room}"):
        engine.submit(np.ones(room, np.uint32), max_new_tokens=1)
    assert engine.forward(np.ones(room, np.uint32))["logits"].shape == (room, 260)
    with pytest.raises(_core.ContextOverflowError, match=f"{room + 1} tokens"):
        engine.forward(np.ones(room + 1, np.uint32))


def test_requests_report_how_they_went(engine):
    request = engine.submit(np.arange(9, dtype=np.uint32), max_new_tokens=6, temperature=0.0)
    tokens = finish(request)
    assert (len(tokens), request.finish_reason) == (6, "length")
    assert request.prompt_seconds > 0
    assert request.decode_seconds > 0
    assert request.wait() is None
    stop = tokens[2].id
    first = next(i for i, t in enumerate(tokens) if t.id == stop)
    request = engine.submit(
        np.arange(9, dtype=np.uint32), max_new_tokens=6, temperature=0.0, eos=[stop]
    )
    assert ([t.id for t in finish(request)], request.finish_reason) == (
        [t.id for t in tokens[: first + 1]],
        "stop",
    )


def test_memory_that_was_not_allowed(directory):
    for device in DEVICES:
        engine = load(directory, device=device, cache_bytes=1)
        request = engine.submit(np.ones(60, np.uint32), max_new_tokens=5)
        with pytest.raises(_core.MemoryBudgetError, match=r"\d+ bytes"):
            finish(request)
        with pytest.raises(MemoryError):
            request.wait()
        with pytest.raises(_core.MemoryBudgetError):
            engine.score(np.ones(60, np.uint32))


def test_cancelling(engine):
    # A thread that loses its processor in between finds a request done, but not always.
    for _ in range(50):
        request = engine.submit(np.arange(50, dtype=np.uint32), max_new_tokens=70)
        request.cancel()
        if len(finish(request)) < 70:
            break
    else:
        pytest.fail("all 50 requests ran to their end")
    assert request.finish_reason == "cancelled"
    request.cancel()
    del request
    # A request that nobody holds is cancelled too, and its memory freed.
    for _ in range(20):
        engine.submit(np.arange(50, dtype=np.uint32), max_new_tokens=70)
    deadline = time.monotonic() + 20
    while any(engine.stats()[k] for k in ("running", "waiting", "cache_bytes")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_closing(directory):
    engine = load(directory, device="reference")
    request = engine.submit(np.arange(50, dtype=np.uint32), max_new_tokens=70)
    engine.close()
    engine.close()
    with pytest.raises(_core.DeviceError, match="closed"):
        finish(request)
    with pytest.raises(_core.DeviceError, match="closed"):
        engine.score(np.ones(4, np.uint32))


# Living in a Python process


def script(body, *arguments, **options):
    """A Python process with an engine over a model that takes minutes, if it is not stopped."""
    head = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, signal, threading, time
import numpy as np
from pathlib import Path
from kbit import _core
from engines import finish, load
engine = load(Path(sys.argv[1]), device=sys.argv[2])
"""
    return subprocess.Popen(
        [sys.executable, "-c", head + body, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """One whose context takes many seconds on the reference device."""
    config = {"max_position_embeddings": 100_000}
    return tiny.make(tmp_path_factory.mktemp("slow"), text=False, config=config)


CALLS = {
    "wait": "finish(engine.submit(ids[:10], max_new_tokens=10**6))",
    "long wait": "engine.submit(ids, max_new_tokens=1).wait(1000.0)",
    "forward": "engine.forward(ids)",
    "score": "engine.score(ids)",
}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c(slow, call):
    body = f"""
ids = np.ones(20_000, np.uint32)
print("ready", flush=True)
try:
    {CALLS[call]}
except KeyboardInterrupt:
    print(time.time(), flush=True)
"""
    process = script(body, slow, "reference")
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    time.sleep(0.3)
    assert process.poll() is None
    sent = time.time()
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert float(out) - sent < 0.25


def test_leaving_the_interpreter_while_it_generates(slow):
    body = """
requests = [engine.submit(np.ones(5000, np.uint32), max_new_tokens=1000) for _ in range(4)]
threading.Thread(target=lambda: finish(requests[0]), daemon=True).start()
time.sleep(0.2)
print("leaving", flush=True)
"""
    for device in DEVICES:
        process = script(body, slow, device)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "leaving\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork of POSIX")
def test_a_fork_says_that_it_cannot(directory):
    body = """
import warnings; warnings.simplefilter("ignore")
request = engine.submit(np.ones(5, np.uint32), max_new_tokens=100)
child = os.fork()
if child == 0:
    for call in (lambda: engine.submit(np.ones(5, np.uint32), max_new_tokens=1), lambda: engine.score(np.ones(5, np.uint32)), request.wait):
        try:
            call()
        except _core.DeviceError as error:
            assert "fork" in str(error)
        else:
            os._exit(1)
    engine.close()
    del engine
    os._exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), len(finish(request)))
"""
    process = script(body, directory, "reference")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "0 100\n", "")


def test_the_gil_is_free(slow):
    body = """
def count(seconds):
    n, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        n += 1
    return n
ids = np.ones(3000, np.uint32)
solo = max(count(0.2) for _ in range(8))
work = [lambda: engine.score(ids), lambda: finish(engine.submit(ids, max_new_tokens=500))]
threads = [threading.Thread(target=w, daemon=True) for w in work]
for t in threads: t.start()
time.sleep(0.1)
beside = max(count(0.2) for _ in range(8))
assert all(t.is_alive() for t in threads)
print(beside / solo)
"""
    # The reference device: one thread, so that the counter has a core of its own. What else the machine does shows in
    # a try, so there are some; a GIL that is held shows in all.
    rates = []
    while len(rates) < 5 and max(rates, default=0) < 0.8:
        process = script(body, slow, "reference")
        out, err = process.communicate(timeout=100)
        assert (process.returncode, err) == (0, "")
        rates.append(float(out))
    assert max(rates) >= 0.8, rates

"""The border between Python and Rust: exceptions, arrays in and out, what the build says about itself."""

import importlib.metadata
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

import kbit
import tiny
from engines import finish, load, parts
from kbit import _core, loading

EXCEPTIONS = {
    "ModelFormatError": ValueError,
    "UnsupportedModelError": NotImplementedError,
    "ContextOverflowError": ValueError,
    "GrammarError": ValueError,
    "MemoryBudgetError": MemoryError,
    "DeviceError": RuntimeError,
    "GenerationCancelled": Exception,
}


@pytest.mark.parametrize(("name", "builtin"), EXCEPTIONS.items())
def test_exceptions_are_caught_as_ours_and_as_pythons(name, builtin):
    kind = getattr(_core, name)
    assert kind is getattr(kbit, name)
    assert issubclass(kind, _core.KbitError)
    assert issubclass(kind, builtin)
    assert kind.__doc__
    error = pickle.loads(pickle.dumps(kind("a sentence")))
    assert (type(error), error.args) == (kind, ("a sentence",))


# Files


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory):
    """One tensor of each dtype that NumPy has, written by the safetensors package."""
    rng = np.random.default_rng(0)
    names = ["f4", "f8", "f2", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?"]
    tensors = {n: rng.integers(0, 2 if n == "?" else 100, (3, 4, 5)).astype(n) for n in names}
    tensors["scalar"] = np.array(7.5, np.float32)
    path = tmp_path_factory.mktemp("dtypes") / "all.safetensors"
    save_file(tensors, path, metadata={"who": "test"})
    return path, tensors


def test_arrays_come_as_they_are(every_dtype):
    path, tensors = every_dtype
    file = _core.TensorFile(path)
    assert (file.path, file.format, file.metadata) == (str(path), "safetensors", {"who": "test"})
    assert sorted(file.names()) == sorted(tensors)
    for name, expected in tensors.items():
        array = file.read(name)
        assert (
            (array.dtype, array.shape)
            == (expected.dtype, expected.shape)
            == (array.dtype, file.shape(name))
        )
        assert np.array_equal(array, expected)
        assert file.nbytes(name) == expected.nbytes
        # Ours alone: writing to it changes nothing, and it outlives the file.
        assert array.flags.writeable
        array[...] = 0
        assert np.array_equal(file.read(name), expected)
    array = file.read("f4")
    del file
    assert np.array_equal(array, tensors["f4"])


def test_a_missing_file_is_pythons_own_error(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        _core.TensorFile(tmp_path / "no.safetensors")
    assert caught.value.filename == str(tmp_path / "no.safetensors")
    with pytest.raises(IsADirectoryError):
        _core.TensorFile(tmp_path)
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(kbit.ModelFormatError, match=r"short: .* 8 bytes, the file has 3"):
        _core.TensorFile(tmp_path / "short")
    with pytest.raises(TypeError):
        _core.TensorFile(3)


def test_unknown_names_are_named(every_dtype):
    file = _core.TensorFile(every_dtype[0])
    for call in (file.read, file.dtype, file.shape, file.nbytes):
        with pytest.raises(ValueError, match="nobody"):
            call("nobody")


# Arrays in


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return load(tiny.make(tmp_path_factory.mktemp("tiny"), text=False))


def test_ids_are_uint32_in_one_dimension(engine):
    for wrong in (np.arange(5), np.arange(5.0), [1, 2, 3], "abc", np.ones((2, 2), np.uint32)):
        for call in (
            engine.forward,
            engine.score,
            lambda ids: engine.submit(ids, max_new_tokens=1),
        ):
            with pytest.raises(TypeError):
                call(wrong)


def test_any_layout_of_memory_will_do(engine):
    ids = np.arange(40, dtype=np.uint32)
    expected = engine.score(ids[::3].copy())
    assert np.array_equal(engine.score(ids[::3]), expected)
    backwards = ids[::3][::-1].copy()[::-1]
    backwards.flags.writeable = False
    assert np.array_equal(engine.score(backwards), expected)


def test_inputs_are_copied(engine):
    ids = np.arange(20, dtype=np.uint32)
    expected = [t.id for t in finish(engine.submit(ids, max_new_tokens=8, temperature=0.0))]
    request = engine.submit(ids, max_new_tokens=8, temperature=0.0)
    ids[:] = 3
    assert [t.id for t in finish(request)] == expected
    values = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    weight = _core.quantize(values, 4)
    before = weight.dequantize()
    values[:] = 0
    assert np.array_equal(weight.dequantize(), before)


def test_results_belong_to_the_caller(engine):
    ids = np.arange(20, dtype=np.uint32)
    first = engine.forward(ids, hidden_states=True, attentions=True)
    kept = first["logits"].copy()
    for array in (first["logits"], *first["hidden_states"], *first["attentions"]):
        assert array.dtype == np.float32
        array[:] = np.nan
    assert np.array_equal(engine.forward(ids)["logits"], kept)


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf"), 1e300])
def test_timeouts_are_numbers_of_seconds(engine, timeout):
    request = engine.submit(np.arange(3, dtype=np.uint32), max_new_tokens=1)
    with pytest.raises(ValueError, match="timeout"):
        request.wait(timeout)
    assert len(finish(request)) == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": -0.5}, ValueError, "temperature .* is -0.5"),
        ({"top_p": 1.5}, ValueError, "top_p .* is 1.5"),
        ({"min_p": -0.1}, ValueError, "min_p .* is -0.1"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty .* is 0"),
        ({"top_k": -1}, OverflowError, None),
        ({"seed": 2**64}, OverflowError, None),
        ({"seed": -1}, OverflowError, None),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens"),
        ({"warmth": 1}, TypeError, "warmth"),
    ],
)
def test_wrong_options_are_named(engine, options, error, words):
    with pytest.raises(error, match=words):
        engine.submit(np.arange(3, dtype=np.uint32), **{"max_new_tokens": 1} | options)


def test_ids_outside_the_vocabulary(engine):
    with pytest.raises(ValueError, match="token id 260 at 2 is outside the vocabulary of 260"):
        engine.score(np.array([1, 2, 260], np.uint32))


# Weights


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_describe_themselves(bits):
    values = np.random.default_rng(bits).standard_normal((40, 300)).astype(np.float32)
    weight = _core.quantize(values, bits)
    told = weight.describe()
    assert (weight.shape, weight.bits, weight.path) == ((40, 300), bits, "integer")
    assert weight.kind.startswith(told["scales"]["kind"])
    assert len(told["codebook"]) == 2**bits
    assert weight.codes().max() < 2**bits
    assert weight.raw().nbytes == told["layout"]["panels"] * told["layout"]["panel_bytes"]
    assert weight.bits_per_weight == weight.nbytes * 8 / values.size
    error = np.abs(weight.dequantize() - values).max()
    assert error < 3.5 * 2.0**-bits * np.abs(values).max()


@pytest.mark.parametrize(
    ("array", "options", "words"),
    [
        (np.ones((4, 64), np.float32), {"bits": 1}, "bits must be 2..=8"),
        (np.ones((4, 64), np.float32), {"bits": 4, "block": 7}, "block"),
        (
            np.ones((4, 64), np.float32),
            {"bits": 4, "format": "best"},
            "format must be .*, is 'best'",
        ),
        (np.full((4, 64), np.nan, np.float32), {"bits": 4}, "row 0"),
        (np.ones((0, 64), np.float32), {"bits": 4}, "rows"),
        (np.ones((4, 64), np.float32), {"bits": 4, "importance": np.ones(3, np.float32)}, "3"),
    ],
)
def test_what_cannot_be_quantised(array, options, words):
    with pytest.raises(ValueError, match=words):
        _core.quantize(array, **options)


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        ([("flip",)], "transform 'flip': known are"),
        ([("rows", 1)], "transform 'rows' does not take 1 arguments"),
        ([("rows", 2, 9)], "2..9"),
        ([("reshape", 7)], "7"),
    ],
)
def test_wrong_transforms(every_dtype, transforms, words):
    file = _core.TensorFile(every_dtype[0])
    with pytest.raises(ValueError, match=words):
        _core.load_weight([(file, "f4")], transforms=transforms)


def test_an_engine_says_what_does_not_fit(tmp_path):
    spec, weights = parts(tiny.make(tmp_path / "model", text=False))
    for bad, words in [
        ("{}", "spec: missing field"),
        ("[", "spec: "),
        (spec.replace('"rms"', '"rmz"'), "'rmz'"),
    ]:
        with pytest.raises(kbit.KbitError, match=words):
            _core.Engine(bad, weights)
    for option, words in [
        ({"device": "abacus"}, "'abacus'"),
        ({"kv": "f8"}, "kv must be .*, is 'f8'"),
        ({"activations": "f64"}, "activations must be"),
        ({"context": 10**6}, "context 1000000 asked of a model with 128 positions"),
        ({"max_batch": 0}, "max_batch must be at least 1, is 0"),
        ({"max_waiting": 0}, "max_waiting must be at least 1, is 0"),
        ({"threads": loading.MAX_THREADS + 1}, f"threads must be at most {loading.MAX_THREADS}"),
    ]:
        with pytest.raises((ValueError, kbit.KbitError), match=words):
            _core.Engine(spec, weights, **option)
    with pytest.raises(TypeError):
        _core.Engine(spec, {"embed.weight": 3})
    norm = weights.pop("final_norm.weight")
    del weights["layers.1.mlp.up.weight"]
    words = "missing tensors: layers.1.mlp.up.weight; left over: layers.0.attn.z.weight"
    with pytest.raises(kbit.ModelFormatError, match=words):
        _core.Engine(spec, weights | {"layers.0.attn.z.weight": norm})


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("call", ["quantize", "load_weight"])
def test_ctrl_c_while_quantising(call, tmp_path):
    body = f"""
import sys, time
import numpy as np
from kbit import _core
from safetensors.numpy import save_file
values = np.random.default_rng(0).standard_normal((6144, 4096), np.float32)
save_file({{"w": values}}, sys.argv[1])
file = _core.TensorFile(sys.argv[1])
print("ready", flush=True)
try:
    _core.quantize(values, 5, threads=1) if "{call}" == "quantize" else _core.load_weight([(file, "w")], bits=5, threads=1)
except KeyboardInterrupt:
    print(time.time(), flush=True)
else:
    print("too fast to be stopped")
"""
    path = str(tmp_path / "big.safetensors")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", body, path], **pipes)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    time.sleep(0.15)
    sent = time.time()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert float(out) - sent < 0.25


# The build


def test_the_build_says_what_it_is():
    info = _core.build_info()
    assert set(info) == {"version", "commit", "profile", "target", "rustc", "features"}
    assert info["version"] == importlib.metadata.version("kbit")
    assert info["rustc"].startswith("rustc ")
    assert all(isinstance(v, str) for v in info.values())


def say(expression, **environment):
    """What a fresh process prints, and nothing beside it."""
    done = subprocess.run(
        [sys.executable, "-c", f"from kbit import _core; print({expression})"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_instruction_sets():
    assert _core.isas()[0] == "scalar"
    assert _core.isa() in _core.isas()
    for isa in _core.isas():
        assert say("_core.isa()", KBIT_ISA=isa) == isa
    assert say("_core.isa()", KBIT_ISA="") == _core.isas()[-1]
    assert "abacus" in say("_core.isa()", KBIT_ISA="abacus")


def test_threads():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= int(say("_core.default_threads()", KBIT_NUM_THREADS="")) <= cores
    assert say("_core.default_threads()", KBIT_NUM_THREADS="3") == "3"
    for wrong in ("0", "many", "-1"):
        assert "KBIT_NUM_THREADS" in say("_core.default_threads()", KBIT_NUM_THREADS=wrong)


def test_looking_for_adapters_is_quiet():
    adapters = _core.gpu_adapters()
    assert all(isinstance(name, str) for name in adapters)
    assert say("_core.gpu_adapters()") == str(adapters)

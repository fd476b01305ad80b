"""Products with k-bit matrices: equal to the oracle to the bit, on every instruction set."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from kbit import _core
from strategies import (
    GGML,
    activations,
    bits,
    formats,
    matrices,
    native_blocks,
    write_gguf,
    write_gptq,
    write_mxfp4,
)


def check(weight, x, **options):
    matrix = reference.take_apart(weight.describe(), weight.raw())
    expected = reference.matmul(matrix, x)
    got = weight.matmul(x, **options)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


@given(bits, matrices(), formats, native_blocks, st.integers(0, 3), st.data())
def test_native_matrices(k, values, format, block, threads, data):
    weight = _core.quantize(values, k, format=format, block=block)
    check(weight, data.draw(activations(values.shape[1])), threads=threads)


@pytest.mark.parametrize("kind", GGML)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**32 - 1), st.data())
def test_ggufs_types(tmp_path_factory, kind, rows, supers, seed, data):
    path = tmp_path_factory.mktemp("gguf") / "w.gguf"
    write_gguf(path, kind, rows, supers * 256, seed)
    weight = _core.load_weight([(_core.TensorFile(path), "w")])
    check(weight, data.draw(activations(supers * 256)))


def test_packed_dialects(tmp_path):
    """Zero points under an input permutation, and scales that are powers of two."""
    rng = np.random.default_rng(3)
    gptq = _core.load_packed("gptq", write_gptq(tmp_path / "gptq.safetensors"), bits=4)
    check(gptq, rng.standard_normal((5, 256)).astype(np.float32))
    parts = write_mxfp4(tmp_path / "mxfp4.safetensors")
    expert = _core.load_packed("mxfp4", parts, transforms=[("select", 1)])
    check(expert, rng.standard_normal((5, 128)).astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 100])
def test_every_batch_is_its_tokens_alone(tokens):
    rng = np.random.default_rng(tokens)
    weight = _core.quantize(rng.standard_normal((50, 700)).astype(np.float32), 3)
    x = rng.standard_normal((tokens, 700)).astype(np.float32)
    check(weight, x)
    alone = np.concatenate([weight.matmul(row[None]) for row in x])
    assert (weight.matmul(x) == alone).all()


@given(bits, matrices(24, 300), st.data())
def test_unquantised_activations(k, values, data):
    """`activations="f32"`: the dequantised values by the float path."""
    weight = _core.quantize(values, k)
    x = data.draw(activations(values.shape[1]))
    got = weight.matmul(x, activations="f32")
    assert got.tobytes() == reference.matmul_float(weight.dequantize(), x).tobytes()


def test_the_error_of_int8_activations_is_bounded():
    """Against float64: half a step of the activations times the weights, and the rounding of 4 sums."""
    rng = np.random.default_rng(7)
    weight = _core.quantize(rng.standard_normal((64, 1000)).astype(np.float32), 4)
    x = rng.standard_normal((9, 1000)).astype(np.float32)
    w = weight.dequantize().astype(np.float64)
    _, sa = reference.quantize_activations(x)
    step = sa.repeat(256, 1)[:, :1000].astype(np.float64)
    magnitude = (np.abs(x) + step) @ np.abs(w).T
    bound = step / 2 @ np.abs(w).T + 16 * 2.0**-24 * magnitude
    assert (np.abs(weight.matmul(x) - x @ w.T) <= bound).all()


def test_what_is_not_finite_stays_so():
    weight = _core.quantize(np.ones((20, 600), np.float32), 4)
    x = np.ones((3, 600), np.float32)
    x[1, 300] = np.inf
    y = weight.matmul(x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()
    zero = weight.matmul(np.full((1, 600), 1e-31, np.float32))
    assert not zero.any()


def test_shapes_that_do_not_fit_name_both():
    weight = _core.quantize(np.ones((20, 600), np.float32), 4)
    with pytest.raises(ValueError, match=r"600.*599|599.*600"):
        weight.matmul(np.ones((2, 599), np.float32))
    with pytest.raises(ValueError, match="int4"):
        weight.matmul(np.ones((2, 600), np.float32), activations="int4")


def cases():
    """Every width and scale kind, ragged shapes, batches on both sides of the kernels' steps."""
    rng = np.random.default_rng(11)
    for k in range(2, 9):
        for block in (16, 32, 64, 256):
            values = rng.standard_normal((37, 330 + 64 * k)).astype(np.float32)
            weight = _core.quantize(values, k, block=block)
            for tokens in (1, 3, 17):
                x = rng.standard_normal((tokens, values.shape[1])).astype(np.float32)
                yield weight, x


def test_every_instruction_set_gives_the_oracles_bits(tmp_path):
    expected = [
        reference.matmul(reference.take_apart(w.describe(), w.raw()), x) for w, x in cases()
    ]
    expected = b"".join(y.tobytes() for y in expected)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_linear as t\n"
        "open(sys.argv[2], 'wb').write(b''.join(w.matmul(x).tobytes() for w, x in t.cases()))\n"
        "print(t._core.isa())"
    )
    here = os.path.dirname(__file__)
    for isa in _core.isas():
        out = tmp_path / isa
        run = subprocess.run(
            [sys.executable, "-c", script, here, str(out)],
            env={**os.environ, "KBIT_ISA": isa}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == isa
        assert out.read_bytes() == expected, isa

"""The layout of docs/formats.md: bytes, codes, values, against the NumPy oracle."""

import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import reference
from kbit import _core
from strategies import (
    GGML,
    bits,
    formats,
    matrices,
    native_blocks,
    write_gguf,
    write_gptq,
    write_mxfp4,
)


@given(bits, st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_unpack_undoes_pack_in_the_oracle(k, panels, chunks, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << k, (panels * 16, chunks * 64)).astype(np.uint8)
    packed = reference.pack(codes, k)
    assert packed.shape == (panels, chunks, k * 128)
    assert (reference.unpack(packed, k) == codes).all()


def test_one_code_lies_where_the_diagram_says():
    """Row 3, input 21 (vector 5, byte 13) at 7 bits: planes of 4, 2 and 1 bits at 0, 512 and 768."""
    codes = np.zeros((16, 64), np.uint8)
    codes[3, 21] = 0b1_10_1001
    packed = reference.pack(codes, 7).reshape(-1)
    where = {2 * 64 + 13: 0b1001 << 4, 512 + 64 + 13: 0b10 << 2, 768 + 13: 1 << 5}
    assert {int(i): int(packed[i]) for i in packed.nonzero()[0]} == where


def check(weight):
    """Layout, codes and values of a weight are those of the oracle; gives the matrix taken apart."""
    header, raw = weight.describe(), weight.raw()
    layout = reference.layout(header["bits"], *header["shape"], header["scales"])
    assert header["layout"] == layout
    assert len(raw) == layout["panels"] * layout["panel_bytes"]
    matrix = reference.take_apart(header, raw)
    assert (weight.codes() == matrix.codes).all()
    values = reference.dequantize(matrix)
    assert values.tobytes() == weight.dequantize().tobytes()
    return matrix


@given(bits, matrices(), formats, native_blocks)
def test_native_matrices(k, values, format, block):
    weight = _core.quantize(values, k, format=format, block=block)
    matrix = check(weight)
    assert weight.bits == k
    assert weight.path == "integer"
    assert np.abs(matrix.levels).max() <= 127
    tables = (1 << k) + (16 if matrix.scales["kind"] == "ladder" else 0)
    assert weight.nbytes == len(weight.raw()) + tables
    assert weight.bits_per_weight == weight.nbytes * 8 / values.size
    assert (np.diff(weight.describe()["codebook"]) >= 0).all()
    # Padding is zero, so that equal matrices have equal bytes.
    header = weight.describe()
    assert (
        reference.assemble(k, matrix.scales, *parts(header, weight.raw())) == weight.raw()
    ).all()


def parts(header, raw):
    """Codes, rungs and scales of a native matrix as the oracle's quantiser gives them."""
    m = reference.take_apart(header, raw)
    wide = reference.f32_to_bf16(m.scale)
    rungs = np.zeros((m.rows, -(-m.inputs // m.scales["block"])), np.uint8)
    if m.sub is not None:
        at = header["layout"]
        flat = raw.reshape(at["panels"], at["panel_bytes"])[:, at["fine_at"] :]
        pairs = flat[:, : -(-at["blocks"] // 2) * 16].reshape(at["panels"], -1, 16)
        every = np.stack([pairs & 15, pairs >> 4], 2).reshape(at["panels"], -1, 16)
        rungs = every.transpose(0, 2, 1).reshape(-1, every.shape[1])[: m.rows, : rungs.shape[1]]
    return m.codes, rungs, wide


@pytest.mark.parametrize("kind", GGML)
@given(rows=st.integers(1, 20), supers=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_ggufs_types(tmp_path_factory, kind, rows, supers, seed):
    path = tmp_path_factory.mktemp("gguf") / "w.gguf"
    write_gguf(path, kind, rows, supers * 256, seed)
    check(_core.load_weight([(_core.TensorFile(path), "w")]))


def test_gptq_with_a_permutation(tmp_path):
    parts = write_gptq(tmp_path / "w.safetensors")
    matrix = check(_core.load_packed("gptq", parts, bits=4))
    assert matrix.scales["offset"] == "zero"
    assert matrix.permutation is not None


def test_mxfp4(tmp_path):
    parts = write_mxfp4(tmp_path / "w.safetensors")
    matrix = check(_core.load_packed("mxfp4", parts, transforms=[("select", 1)]))
    assert matrix.scales["scale"] == "e8m0"


@given(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3))
@example([0x5E1F4DC6, 0x60CDB1ED, 0])  # infinity: nearer to 2^128 than to the largest
@example([0x5E1F4DC3, 0x60CDB1F0, 0])  # rounded up to the largest
def test_the_oracles_fma_rounds_once(words):
    """Against exact rational arithmetic."""
    from fractions import Fraction

    a, b, c = (struct.unpack("<f", struct.pack("<I", w))[0] for w in words)
    if not np.isfinite([a, b, c]).all():
        return
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = float(reference.fma(np.float32(a), np.float32(b), np.float32(c)))
    if abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103:
        assert np.isinf(got)
        return
    assert np.isfinite(got)
    for side in (-np.inf, np.inf):
        with np.errstate(over="ignore"):  # beside the largest is infinity
            other = float(np.nextafter(np.float32(got), np.float32(side)))
        if np.isfinite(other):
            assert abs(Fraction(got) - exact) <= abs(Fraction(other) - exact)


def test_the_oracles_fma_where_float64_alone_rounds_twice():
    a, b = np.float32(1 + 2**-12), np.float32(1 + 2**-12)
    c = np.float32(2.0**-60)
    # a * b = 1 + 2^-11 + 2^-24: half-way between two floats; c decides.
    assert reference.fma(a, b, c) == np.float32(1 + 2**-11 + 2**-23)
    assert reference.fma(a, b, -c) == np.float32(1 + 2**-11)
    assert np.float32(np.float64(a) * np.float64(b) + np.float64(c)) == np.float32(1 + 2**-11)

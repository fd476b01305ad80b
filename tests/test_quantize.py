"""The quantiser: laws that hold for every matrix, and the oracle bit for bit."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import kbit
import reference
from kbit import _core
from strategies import bits, formats, matrices, native_blocks


def squared_error(weight, values):
    return float(((weight.dequantize().astype(np.float64) - values) ** 2).sum())


@given(bits, matrices(24, 400), formats, native_blocks, st.booleans())
def test_the_oracle_chooses_the_same_bits(k, values, format, block, weighted):
    """For the codebook and ladder that were learned: the same codes, rungs, scales, bytes."""
    importance = None
    if weighted:
        rng = np.random.default_rng(values.shape[1])
        importance = rng.exponential(size=values.shape[1]).astype(np.float32)
    weight = _core.quantize(values, k, format=format, block=block, importance=importance)
    header = weight.describe()
    chosen = reference.quantize(values, k, header["codebook"], header["scales"], importance)
    assert (chosen[0] == weight.codes()).all()
    assert (reference.assemble(k, header["scales"], *chosen) == weight.raw()).all()


@given(bits, matrices(), formats, native_blocks)
def test_no_single_code_does_better(k, values, format, block):
    """Half a step, exactly: every weight has the nearest value that its scales can represent."""
    weight = _core.quantize(values, k, format=format, block=block)
    m = reference.take_apart(weight.describe(), weight.raw())
    book = np.array(weight.describe()["codebook"], np.int64)
    wide = m.scale[:, np.arange(m.inputs) // 256].astype(np.float64)
    sub = np.full((m.rows, m.inputs), 128)
    if m.sub is not None:
        sub = m.sub[:, np.arange(m.inputs) // m.scales["block"]]
    every = (book * sub[..., None] + 64 >> 7) * wide[..., None]  # (rows, inputs, codes)
    distance = np.abs(every - values[..., None].astype(np.float64))
    got = np.abs(weight.dequantize().astype(np.float64) - values)
    # The division w / scale is rounded once: a tie may be missed by that much.
    assert (got <= distance.min(-1) + np.abs(values) * 2.0**-23).all()


@given(matrices(), st.sampled_from(["int", "learned"]))
def test_more_bits_never_err_more(values, format):
    errors = [squared_error(_core.quantize(values, k, format=format), values) for k in (2, 4, 6, 8)]
    scale = float((values.astype(np.float64) ** 2).sum())
    for wide, narrow in zip(errors[1:], errors, strict=False):
        assert wide <= narrow + 1e-4 * scale


@given(bits, matrices(), st.sampled_from([1, 2, 3]))
def test_threads_change_nothing(k, values, threads):
    one, many = (_core.quantize(values, k, threads=t) for t in (0, threads))
    assert (one.raw() == many.raw()).all()
    assert one.describe() == many.describe()


@given(st.integers(2, 7), matrices(20, 500), st.sampled_from([16, 32, 64]), st.data())
def test_a_block_of_zeros_stays_zero(k, values, block, data):
    row = data.draw(st.integers(0, len(values) - 1))
    at = data.draw(st.integers(0, (values.shape[1] - 1) // block)) * block
    values[row, at : at + block] = 0
    assert not _core.quantize(values, k, block=block).dequantize()[row, at : at + block].any()


@given(bits, st.integers(1, 40), st.integers(1, 600))
def test_zeros_give_zeros(k, rows, inputs):
    assert not _core.quantize(np.zeros((rows, inputs), np.float32), k).dequantize().any()


@given(bits, matrices(), st.integers(-20, 20))
def test_powers_of_two_move_the_scales_only(k, values, power):
    values = np.where(np.abs(values) < 1e-15, 0, values).astype(np.float32)
    assume(np.abs(values).max() < 1e15)
    plain = _core.quantize(values, k)
    moved = _core.quantize(np.ldexp(values, power), k)
    assert moved.describe() == plain.describe()
    assert (moved.codes() == plain.codes()).all()
    assert (moved.dequantize() == np.ldexp(plain.dequantize(), power)).all()


@given(bits, matrices(64), st.sampled_from(["int", "nf"]), st.randoms(use_true_random=False))
def test_permuted_rows_are_permuted_results(k, values, format, random):
    """With a fixed codebook and one scale a row (what is learned depends on the sample)."""
    order = list(range(len(values)))
    random.shuffle(order)
    plain = _core.quantize(values, k, format=format, block=256).dequantize()
    moved = _core.quantize(values[order], k, format=format, block=256).dequantize()
    assert (moved == plain[order]).all()


@given(bits, matrices(), native_blocks)
def test_what_is_representable_stays(k, values, block):
    """Integers of the width times a power of two, with the peak in every super-block."""
    limit = 1 << (k - 1)
    grid = np.clip(np.rint(values), 1 - limit, limit - 1).astype(np.float32)
    grid[:, ::16] = -limit
    again = _core.quantize(grid / limit, k, format="int", block=block).dequantize() * limit
    # -128 is stored as -127 and the steps are whole, so 1/128 of the peak is the worst.
    assert (np.abs(again - grid) <= limit / 64).all()


def test_a_large_matrix_uses_its_sample():
    """Learned tables come from 64 rows; the rest of the matrix is served as well by them."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((512, 1024)).astype(np.float32)
    for k, least in zip(range(2, 9), (9.6, 15.7, 21.9, 27.8, 33.6, 38.8, 42.5), strict=True):
        error = squared_error(_core.quantize(values, k), values)
        assert 10 * np.log10(float((values**2).sum()) / error) > least, k


def test_learned_errs_least():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((256, 512)).astype(np.float32)
    for k in range(2, 8):
        error = {f: squared_error(_core.quantize(values, k, format=f), values)
                 for f in ("learned", "int", "float", "quantile", "nf")}  # fmt: skip
        assert min(error, key=error.get) == "learned", (k, error)


def test_importance_moves_the_error():
    rng = np.random.default_rng(2)
    values = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.ones(512, np.float32)
    importance[::2] = 100
    for k in (2, 3, 4):
        plain, weighted = (kbit.quantize(values, k, importance=i).dequantize() - values
                           for i in (None, importance))  # fmt: skip
        assert (weighted[:, ::2] ** 2).sum() < (plain[:, ::2] ** 2).sum()


@pytest.mark.parametrize(("bad", "name"), [(np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_values_that_are_not_finite_are_named(bad, name):
    values = np.ones((100, 300), np.float32)
    values[77, 299] = bad
    with pytest.raises(ValueError, match=f"row 77, column 299 is {name}, not finite"):
        _core.quantize(values, 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 1}, "2..=8"),
        ({"bits": 9}, "2..=8"),
        ({"block": 48}, "16, 32, 64 or 256, is 48"),
        ({"format": "trellis"}, "'trellis'"),
        ({"importance": np.ones(63, np.float32)}, "wants 64 values, has 63"),
        ({"importance": np.zeros(64, np.float32)}, "zero everywhere"),
        ({"importance": np.full(64, -1, np.float32)}, "is -1 at input 0"),
        ({"importance": np.full(64, np.nan, np.float32)}, "is NaN at input 0"),
    ],
)
def test_arguments_that_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        _core.quantize(np.ones((4, 64), np.float32), **{"bits": 4, **options})


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices_are_refused(shape):
    with pytest.raises(ValueError, match="rows and inputs"):
        _core.quantize(np.zeros(shape, np.float32), 4)

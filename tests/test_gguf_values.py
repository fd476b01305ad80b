"""GGUF's block types against the `gguf` package: a million random blocks of each, every value bit for bit.

Blocks are random bytes, so scales are everything a half can be: zeros of both signs, subnormal, infinite, not a number.
"""

import gguf
import numpy as np
import pytest

from kbit import _core

TYPES = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
]
BLOCKS = 1_000_000
ROWS = 625
"""Rows of a tensor: 39 panels of 16 and one row."""
PIECE = 50_000
"""Blocks of a file, so that nothing takes more than 100 MB."""


def write(path, kind, raw):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TYPES)
def test_a_million_blocks(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    path = tmp_path / "blocks.gguf"
    total = 0
    while total < BLOCKS:
        raw = rng.integers(0, 256, (ROWS, PIECE // ROWS * size), np.uint8)
        write(path, kind, raw)
        file = _core.TensorFile(path)
        weight = _core.load_weight([(file, "w")])
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw, kind)
        assert weight.shape == expected.shape == (ROWS, PIECE // ROWS * elements)
        check(weight.dequantize(), expected)
        if total == 0:
            assert weight.nbytes <= 1.15 * raw.nbytes
            check(file.read("w"), expected)
        total += raw.size // size
    assert total == BLOCKS


def check(found, expected):
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    bits = found.view(np.uint32) != expected.view(np.uint32)
    wrong = np.argwhere(bits & ~nan)
    assert not len(wrong), f"{len(wrong)} values differ, the first at {wrong[0]}"

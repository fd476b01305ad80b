"""What hypothesis draws: matrices, widths, formats; and small files of packed weights."""

import struct

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kbit import _core

bits = st.integers(2, 8)
formats = st.sampled_from(["int", "float", "quantile", "nf", "learned"])
native_blocks = st.sampled_from([None, 16, 32, 64, 256])


@st.composite
def matrices(draw, max_rows=40, max_inputs=600):
    """(rows, inputs) float32: normal, heavy-tailed, sparse or flat, over many magnitudes."""
    rows, inputs = draw(st.integers(1, max_rows)), draw(st.integers(1, max_inputs))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "tails", "sparse", "flat", "scaled"]))
    values = rng.standard_normal((rows, inputs))
    if kind == "tails":
        values = values / np.sqrt(rng.chisquare(3, values.shape) / 3)
    if kind == "sparse":
        values[rng.random(values.shape) < 0.9] = 0
    if kind == "flat":
        values = np.round(values)
    if kind == "scaled":
        values *= 10.0 ** rng.integers(-20, 20, (rows, 1))
    return values.astype(np.float32)


@st.composite
def activations(draw, inputs, max_tokens=5):
    """(tokens, inputs) float32 with outliers and, now and then, blocks of zeros."""
    tokens = draw(st.integers(1, max_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((tokens, inputs)) * 10.0 ** rng.integers(-3, 4)
    x[rng.random(x.shape) < 0.01] *= 50
    if draw(st.booleans()):
        x[0, :256] = 0
    return x.astype(np.float32)


# Type number, weights and bytes of a block, offsets of its f16 scales.
GGML = {
    "Q4_0": (2, 32, 18, (0,)),
    "Q4_1": (3, 32, 20, (0, 2)),
    "Q5_0": (6, 32, 22, (0,)),
    "Q5_1": (7, 32, 24, (0, 2)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q2_K": (10, 256, 84, (80, 82)),
    "Q3_K": (11, 256, 110, (108,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q5_K": (13, 256, 176, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
}


def write_gguf(path, kind, rows, inputs, seed):
    """A GGUF file of one tensor "w" with random codes and sub-scales and sane scales."""
    number, per, size, scales = GGML[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * inputs // per, size), np.uint8)
    for at in scales:
        half = rng.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = half.view(np.uint8)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    header += struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, inputs, rows, number, 0)
    path.write_bytes(header + bytes(-len(header) % 32) + blocks.tobytes())


def save_parts(path, tensors):
    """A safetensors file as the parts of `load_packed`."""
    save_file(tensors, path)
    file = _core.TensorFile(path)
    return {name: (file, name) for name in tensors}


def write_gptq(path, inputs=256, outputs=48, group=64):
    """4 bits, zero points, activation order: a permutation of the inputs."""
    rng = np.random.default_rng(1)
    words = np.int64(2**31)
    tensors = {
        "qweight": rng.integers(-words, words, (inputs // 8, outputs)),
        "qzeros": rng.integers(-words, words, (inputs // group, outputs // 8)),
        "g_idx": rng.permutation(np.repeat(np.arange(inputs // group), group)),
    }
    tensors = {name: values.astype(np.int32) for name, values in tensors.items()}
    scales = rng.uniform(0.01, 0.1, (inputs // group, outputs)).astype(np.float16)
    return save_parts(path, {**tensors, "scales": scales})


def write_mxfp4(path, rows=32, inputs=128):
    """Two experts."""
    rng = np.random.default_rng(2)
    return save_parts(
        path,
        {
            "blocks": rng.integers(0, 256, (2, rows, inputs // 32, 16)).astype(np.uint8),
            "scales": rng.integers(110, 130, (2, rows, inputs // 32)).astype(np.uint8),
        },
    )

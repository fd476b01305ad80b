"""Weights of the golden models: a formula of the tensor's name, so that files hold only outputs.

Norm weights are off one, biases off zero and matrices as large as trained ones, so that every term
of a model shows in its outputs.
"""

import zlib

import numpy as np


def weights(shapes, seed):
    """All tensors of {name: shape} in float32, the same on every machine and NumPy version."""
    return {name: tensor(name, tuple(shape), seed) for name, shape in sorted(shapes.items())}


def tensor(name, shape, seed):
    count = int(np.prod(shape))
    raw = np.random.Philox(key=[seed, zlib.crc32(name.encode())]).random_raw(count)
    # Multiples of 2^-10 in -1..1, and after the powers of two below: exact in float16.
    uniform = ((raw >> np.uint64(53)).astype(np.float32) - 1024.0) / 1024.0
    uniform = uniform.reshape(shape)
    if len(shape) == 1 or "bias" in name:
        is_norm = name.endswith("weight")
        return np.float32(1.0 if is_norm else 0.0) + uniform * np.float32(0.25)
    fan_in = shape[-1]
    return uniform * np.float32(2.0 ** np.round(np.log2(2.0 / np.sqrt(fan_in))))

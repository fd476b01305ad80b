"""Quantise a matrix to every width and see the error and the size; then a whole model, and keep it."""

import tempfile

import numpy as np

import kbit

weights = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)
for bits in range(2, 9):
    q = kbit.quantize(weights, bits)
    error = np.sqrt(np.mean((q.dequantize() - weights) ** 2))
    print(f"{bits} bits: {q.bits_per_weight:.2f} bits per weight, RMS error {error:.4f}")

with tempfile.TemporaryDirectory() as directory, kbit.load() as model:
    model.save(
        directory
    )  # in practice: kbit.load("my-model", bits={"lm_head": 8, "*": 4}).save(...)
    with kbit.load(directory) as again:  # reads what was saved, without work
        print(again.generate("Once upon a time", max_new_tokens=16).text)

"""Saves one of two models over the other until it is killed; run by test_saving.py."""

import sys

import numpy as np

from kbit import _core


def model(which):
    """Half a megabyte; the two differ everywhere."""
    rng = np.random.default_rng(which)
    values = rng.normal(size=(512, 2048)).astype(np.float32)
    return {"w": _core.quantize(values, 4, format="int")}


if __name__ == "__main__":
    models = [model(0), model(1)]
    print("ready", flush=True)
    turn = 0
    while True:
        turn += 1
        _core.save_checkpoint(sys.argv[1], f'{{"model": {turn % 2}}}', models[turn % 2], {})

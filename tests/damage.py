"""Opens damaged copies of a small file, a thousand a process; run by test_hostile.py.

    python damage.py KIND GOOD FROM TO

KIND is safetensors, gguf or config; GOOD is a valid file of n bytes. Case i < n is the file cut to i bytes; case n + j
flips bit j % 8 of byte j // 8. Each must end in an error of kbit's own, or in the content that the reference reader
finds in the same bytes. Prints one JSON object of counts.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import safetensors

from kbit import archs
from kbit._core import KbitError, TensorFile
from kbit.text.hf_json import read_json


def damaged(good, case):
    if case < len(good):
        return good[:case]
    bad = bytearray(good)
    at, bit = divmod(case - len(good), 8)
    bad[at] ^= 1 << bit
    return bytes(bad)


def wide(dtype, data):
    """The float32 bits of bfloat16, anything else as it is."""
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).tobytes() if dtype == "BF16" else data


def same_safetensors(file, path, data):
    with safetensors.safe_open(path, "np") as other:
        assert file.metadata == (other.metadata() or {})
    tensors = dict(safetensors.deserialize(data))
    assert sorted(file.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert file.dtype(name) == tensor["dtype"], name
        assert list(file.shape(name)) == tensor["shape"], name
        assert file.read(name).tobytes() == wide(tensor["dtype"], bytes(tensor["data"])), name


def dequantized(data, kind):
    """float32 values of bytes of a GGUF type; integers as they are."""
    if not data:
        return np.empty(0, np.float32)
    try:
        return gguf.quants.dequantize(np.frombuffer(data, np.uint8), kind).reshape(-1)
    except NotImplementedError:
        return np.frombuffer(data, kind.name.lower().replace("f", "float").replace("i", "int"))


class SameGguf:
    """Compares with `gguf`. While only the data differs from the file before, the header is not read again."""

    def __init__(self):
        self.header = b""
        self.tensors = []
        self.metadata = ""
        self.known = {}

    def __call__(self, file, path, data):
        if not self.header or not data.startswith(self.header):
            other = gguf.GGUFReader(path)
            fields = other.fields.items()
            self.metadata = repr({k: v.contents() for k, v in fields if not k.startswith("GGUF.")})
            self.tensors = [
                (
                    t.name,
                    t.tensor_type,
                    tuple(int(n) for n in reversed(t.shape)),
                    t.data_offset,
                    t.n_bytes,
                )
                for t in other.tensors
            ]
            self.header = data[: other.data_offset]
        assert repr(file.metadata) == self.metadata
        assert file.names() == [name for name, *_ in self.tensors]
        for name, kind, shape, at, size in self.tensors:
            assert file.dtype(name) == kind.name, name
            assert file.shape(name) == shape, name
            raw = data[at : at + size]
            if self.known.get(name, (b"",))[:2] != (raw, kind):
                self.known[name] = (raw, kind, dequantized(raw, kind))
            wanted = self.known[name][2]
            found = file.read(name).reshape(-1).astype(wanted.dtype)
            nan = np.isnan(wanted)
            assert np.array_equal(np.isnan(found), nan), name
            assert found[~nan].tobytes() == wanted[~nan].tobytes(), name


def same_config(value, path, data):
    del path
    assert repr(value) == repr(json.loads(data))


def read(kind, path):
    """What kbit makes of the file."""
    if kind == "config":
        value = read_json(path)
        assert value is not None
        archs.describe(value)
        return value
    file = TensorFile(path)
    for name in file.names():
        file.read(name)
    return file


SAME = {"safetensors": same_safetensors, "gguf": SameGguf(), "config": same_config}


def main():
    kind, good = sys.argv[1], Path(sys.argv[2]).read_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    counts = {"cases": 0, "read": 0, "slowest": 0.0}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        path.write_bytes(good)
        SAME[kind](read(kind, path), path, good)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for case in range(int(sys.argv[3]), int(sys.argv[4])):
            data = damaged(good, case)
            # A new file: the reference reader may still have the last one mapped.
            path.unlink()
            path.write_bytes(data)
            begin = time.perf_counter()
            try:
                found = read(kind, path)
            except KbitError as error:
                name = type(error).__name__
                counts[name] = counts.get(name, 0) + 1
                found = None
            counts["slowest"] = max(counts["slowest"], time.perf_counter() - begin)
            counts["cases"] += 1
            if found is not None:
                try:
                    SAME[kind](found, path, data)
                except Exception as error:
                    raise AssertionError(f"case {case} of {kind}: {error!r}") from error
                counts["read"] += 1
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts["grown_kib"] = after - before
    print(json.dumps(counts))


if __name__ == "__main__":
    main()

"""Checkpoints that others quantised.

Packed by hand to their published layouts, they compute as their plain values do; packed by the public packages
(tests/golden/make_packed.py), their values are what those packages return, bit for bit in the dtype they return.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import kbit
import tiny
from kbit import dialects
from kbit._core import TensorFile

pytestmark = pytest.mark.core
IDS = np.arange(24, dtype=np.uint32) * 7 % 256
GROUP = 32


def pack(codes, bits, axis, order=None):
    """int32 words of codes along an axis, the first in the lowest bits."""
    per = 32 // bits
    codes = np.moveaxis(codes, axis, -1)
    codes = codes.reshape(*codes.shape[:-1], -1, per)[..., order or list(range(per))]
    shifts = np.arange(per, dtype=np.uint32) * bits
    words = (codes.astype(np.uint32) << shifts).sum(-1, dtype=np.uint32).view(np.int32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def random_codes(rng, rows, columns, bits):
    """(codes (in, out), zeros (groups, out), scales (groups, out) f16, values (out, in) f32)."""
    codes = rng.integers(0, 2**bits, (columns, rows))
    zeros = rng.integers(1, 2**bits, (columns // GROUP, rows))
    scales = (rng.integers(1, 64, (columns // GROUP, rows)) / 4096).astype(np.float16)
    step = scales.astype(np.float32).repeat(GROUP, 0)
    values = (codes - zeros.repeat(GROUP, 0)).astype(np.float32) * step
    return codes, zeros, scales, np.ascontiguousarray(values.T)


def gptq(rng, name, array, *, bits):
    codes, zeros, scales, values = random_codes(rng, *array.shape, bits)
    at = name.removesuffix("weight")
    packed = {
        at + "qweight": pack(codes, bits, 0),
        at + "qzeros": pack(zeros - 1, bits, 1),
        at + "scales": scales,
        at + "g_idx": (np.arange(array.shape[1]) // GROUP).astype(np.int32),
    }
    return packed, values


def awq(rng, name, array, *, bits):
    codes, zeros, scales, values = random_codes(rng, *array.shape, bits)
    at = name.removesuffix("weight")
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    packed = {
        at + "qweight": pack(codes, 4, 1, order),
        at + "qzeros": pack(zeros, 4, 1, order),
        at + "scales": scales,
    }
    return packed, values


def fp8(rng, name, array, *, bits):
    raw = rng.integers(0, 256, array.shape).astype(np.uint8)
    raw[raw & 0x7F == 0x7F] = 0  # not a number
    exponent, fraction = (raw >> 3 & 15).astype(int), (raw & 7).astype(int)
    size = np.where(exponent == 0, np.ldexp(fraction, -9), np.ldexp(fraction + 8, exponent - 10))
    blocks = [-(-n // GROUP) for n in array.shape]
    scales = (rng.integers(1, 64, blocks) / 2**20).astype(np.float32)
    spread = scales.repeat(GROUP, 0).repeat(GROUP, 1)[: array.shape[0], : array.shape[1]]
    values = (np.where(raw & 128, -size, size).astype(np.float32) * spread).astype(np.float32)
    return {name: raw, name + "_scale_inv": scales}, values


KINDS = {
    "gptq4": (gptq, 4, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "gptq8": (gptq, 8, {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": False}),
    "awq": (awq, 4, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "fp8": (fp8, 8, {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}),
}


@pytest.fixture(params=list(KINDS))
def pair(request, tmp_path):
    """(packed directory, directory of the same values in f32)."""
    encode, bits, config = KINDS[request.param]
    rng = np.random.default_rng(3)
    packed, plain = {}, {}
    for name, array in tiny.weights().items():
        if array.ndim == 1 or "embed" in name or "lm_head" in name:
            packed[name] = plain[name] = array
        else:
            new, plain[name] = encode(rng, name, array, bits=bits)
            packed |= new
    paths = []
    for stem, tensors in (("packed", packed), ("plain", plain)):
        path = tiny.make(tmp_path / stem)
        tiny.write_safetensors(path / "model.safetensors", tensors)
        paths.append(path)
    described = json.loads((paths[0] / "config.json").read_text())
    described["quantization_config"] = config
    (paths[0] / "config.json").write_text(json.dumps(described))
    return paths


def test_computes_as_its_plain_values(pair):
    with kbit.load(pair[1], kv="f32") as model:
        expected = model.forward(IDS)
        values = model.weights["layers.1.mlp.down.weight"].dequantize()
    with kbit.load(pair[0], activations="f32", kv="f32") as model:
        weight = model.weights["layers.1.mlp.down.weight"]
        assert weight.bits is not None
        assert np.array_equal(weight.dequantize(), values)
        assert np.array_equal(model.forward(IDS), expected)


def test_runs_at_its_own_bits_and_saves(pair, tmp_path):
    with kbit.load(pair[0]) as model:
        before = model.generate(IDS, max_new_tokens=6).token_ids
        model.save(tmp_path / "saved")
        nbytes = model.nbytes
    with kbit.load(tmp_path / "saved") as again:
        assert again.nbytes == nbytes
        assert again.generate(IDS, max_new_tokens=6).token_ids == before


def test_quantises_what_was_quantised_when_asked(pair):
    with kbit.load(pair[0], bits=3) as model:
        assert model.weights["layers.1.mlp.down.weight"].bits == 3
    with pytest.raises(ValueError, match="keep their bits"):
        kbit.load(pair[0], dtype="f32")


GOLDEN = Path(__file__).parent / "golden" / "packed"


def rounded(values, dtype):
    """float32 values rounded to a dtype (to the nearest, ties to even), as float32 again."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        bits = bits + 0x7FFF + (bits >> 16 & 1)
        return (bits & 0xFFFF0000).view(np.float32)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("*.safetensors")))
def test_values_are_those_of_the_package(case, record_line):
    path = GOLDEN / f"{case}.safetensors"
    with safe_open(path, "numpy") as read:
        described = read.metadata() or {}
    file = TensorFile(path)
    dtype, expected = file.dtype("values"), file.read("values").astype(np.float32)
    config = json.loads(described["config"])
    tensors = {name: file for name in file.names() if name != "values"}
    packed = [s for s in dialects.group(tensors, config).values() if s.dialect]
    assert len(packed) == 1
    parts = range(len(expected)) if expected.ndim == 3 else [None]
    for i in parts:  # the experts of gpt-oss
        steps = () if i is None else (("select", i, 0),)
        weight = packed[0].load(steps, bits=None, dtype=None, threads=1)
        wanted = expected if i is None else expected[i]
        assert weight.shape == wanted.shape
        found = rounded(weight.dequantize(), dtype)
        wrong = np.argwhere(found != wanted)  # zeros of both signs are equal
        assert not len(wrong), f"{len(wrong)} of {wanted.size}, first {wrong[0]}"
    record_line(
        f"dialect {case}: {expected.size} values are those of {described['package']} in {dtype}"
    )


def test_every_dialect_has_values_of_a_package():
    methods = set()
    for path in GOLDEN.glob("*.safetensors"):
        with safe_open(path, "numpy") as read:
            methods.add(json.loads((read.metadata() or {})["config"])["quant_method"])
    assert methods == set(dialects.METHODS) - {"gptq_v2", "fbgemm_fp8"}


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"quant_method": "spqr"}, kbit.UnsupportedModelError, "'spqr', kbit reads gptq"),
        ({"quant_method": "awq", "version": "gemv"}, kbit.UnsupportedModelError, "'gemv'"),
        ({"quant_method": "gptq"}, kbit.ModelFormatError, "needs the bits"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            kbit.UnsupportedModelError,
            "marlin",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            kbit.UnsupportedModelError,
            "load_in_8bit",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": 7},
            kbit.ModelFormatError,
            "two whole numbers",
        ),
        ([], kbit.ModelFormatError, "must be an object"),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path, config, error, says):
    path = tiny.make(tmp_path / "m", config={"quantization_config": config or ["x"]})
    with pytest.raises(error, match=says):
        kbit.load(path)


def test_a_missing_part_is_named(pair):
    file = pair[0] / "model.safetensors"
    drop_a_part(file)
    with pytest.raises((kbit.KbitError, ValueError)) as caught:
        kbit.load(pair[0])
    assert "layers.0.mlp.up" in str(caught.value) or "scale" in str(caught.value)


def drop_a_part(file):
    """Writes the file again without the scales of one weight."""
    source = kbit._core.TensorFile(file)
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    del source
    scale = next(n for n in header if "layers.0.mlp.up" in n and "scale" in n)
    gone = header.pop(scale)
    low, high = gone["data_offsets"]
    for entry in header.values():
        if entry["data_offsets"][0] >= high:
            entry["data_offsets"] = [x - (high - low) for x in entry["data_offsets"]]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    body = data[begin : begin + low] + data[begin + high :]
    file.write_bytes(len(head).to_bytes(8, "little") + head + body)

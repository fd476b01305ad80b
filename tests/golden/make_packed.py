"""Makes tests/golden/packed: small weights packed by the public packages, and the values those packages return for them.

Run by hand, without a GPU, where torch and the packages are; the tests read only what it writes:

    pip install torch transformers gptqmodel autoawq bitsandbytes compressed-tensors
    python tests/golden/make_packed.py [name ...]

A file holds the tensors of one linear layer `m` under the names of its checkpoint, `values` (out, in) as the package
dequantises them, and in its metadata the package with its version and the checkpoint's quantization_config.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "packed"
OUT, IN, GROUP = 32, 128, 32


def random_linear(seed):
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = torch.randn(OUT, IN, generator=generator) / 8
    return linear


def affine(weight, groups, bits, symmetric):
    """(scales, zeros), each (out, groups): the range of every group, which need not hold zero, so that some zero points are 0."""
    top = 2**bits - 1
    values = weight.reshape(OUT, groups, -1)
    low, high = values.amin(-1), values.amax(-1)
    if symmetric:
        scales = 2 * values.abs().amax(-1) / top
        return scales.half().float(), torch.full_like(scales, (top + 1) / 2)
    scales = ((high - low) / top).half().float()
    return scales, torch.round(-low / scales).clamp(0, top)


def gptq(bits, *, symmetric, order, checkpoint_format):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

    linear = random_linear(bits)
    groups = IN // GROUP
    g_idx = torch.arange(IN) // GROUP
    if order:
        g_idx = g_idx[torch.randperm(IN, generator=torch.Generator().manual_seed(5))]
    if (
        not symmetric
    ):  # zero points of 0, from which the first version of the format cannot take one
        linear.weight.data[::5] = torch.where(
            g_idx == 0, linear.weight.data[::5].abs(), linear.weight.data[::5]
        )
    sorted_weight = linear.weight.data[:, torch.argsort(g_idx, stable=True)]
    scales, zeros = affine(sorted_weight, groups, bits, symmetric)
    layer = TorchLinear(
        bits=bits, group_size=GROUP, sym=symmetric, desc_act=order, in_features=IN, out_features=OUT,
        format=FORMAT.GPTQ_V2,
    )  # fmt: skip
    layer.pack_original(linear, scales, zeros, g_idx.int())
    if checkpoint_format == "gptq":
        convert_gptq_v2_to_v1_format_module(
            layer, SimpleNamespace(bits=bits, pack_dtype=torch.int32)
        )
    parts = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {f"m.{part}": getattr(layer, part).clone() for part in parts}
    if checkpoint_format == "gptq":  # as the package loads its own file
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.post_init()
    values = layer.dequantize_weight().T.contiguous()
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": order, "sym": symmetric,
        "checkpoint_format": checkpoint_format,
    }  # fmt: skip
    return "gptqmodel", config, tensors, values


def awq():
    # awq/__init__.py wants a transformers of its time; the packing needs none of it.
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    linear = random_linear(4)
    scales, zeros = affine(linear.weight.data, IN // GROUP, 4, False)
    layer = WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    values = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP).T.contiguous()
    tensors = {f"m.{part}": getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    return "autoawq", config, tensors, values


def bitsandbytes(kind, dtype, *, nested):
    from bitsandbytes import functional

    weight = random_linear(7).weight.data.to(dtype)
    packed, state = functional.quantize_4bit(
        weight, quant_type=kind, blocksize=64, compress_statistics=nested
    )
    values = functional.dequantize_4bit(packed, state)
    parts = {f"m.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }  # fmt: skip
    return "bitsandbytes", config, {"m.weight": packed} | parts, values


def compressed(bits, *, symmetric):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP
    )
    weight = random_linear(bits + 20).weight.data.bfloat16()
    by_group = weight.reshape(OUT, -1, GROUP)
    scales, zeros = calculate_qparams(by_group.amin(-1), by_group.amax(-1), args)
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros.to(torch.int8)}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packed = PackedQuantizationCompressor.compress(state, scheme)
    values = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": GROUP,
    }
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    return (
        "compressed-tensors",
        config,
        {f"m.{name}": part for name, part in packed.items()},
        values,
    )


def compressed_fp8():
    from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    weight = random_linear(31).weight.data.bfloat16()
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scales, _ = calculate_qparams(low, high, args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packed = FloatQuantizationCompressor.compress(
        {"weight": weight, "weight_scale": scales}, scheme
    )
    values = FloatQuantizationCompressor.decompress(packed, scheme)["weight"]
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    config = {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    return (
        "compressed-tensors",
        config,
        {f"m.{name}": part for name, part in packed.items()},
        values,
    )


def fp8():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    block = 32
    weight = random_linear(33).weight.data
    blocks = weight.reshape(OUT // block, block, IN // block, block)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(OUT, IN)
    values = Fp8Dequantize(None)._dequantize_one(packed, scales, torch.bfloat16)
    config = {"quant_method": "fp8", "weight_block_size": [block, block]}
    return "transformers", config, {"m.weight": packed, "m.weight_scale_inv": scales}, values


def mxfp4():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(11)
    blocks = torch.randint(0, 256, (2, 16, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 16, 2), generator=generator, dtype=torch.uint8)
    values = convert_moe_packed_tensors(blocks, scales).transpose(1, 2).contiguous()
    return (
        "transformers",
        {"quant_method": "mxfp4"},
        {"m_blocks": blocks, "m_scales": scales},
        values,
    )


CASES = {
    **{f"gptq{b}": (lambda b=b: gptq(b, symmetric=True, order=False, checkpoint_format="gptq")) for b in (2, 3, 4, 8)},
    **{f"gptq{b}_order": (lambda b=b: gptq(b, symmetric=False, order=True, checkpoint_format="gptq")) for b in (2, 3, 4, 8)},
    "gptq4_v2": lambda: gptq(4, symmetric=False, order=True, checkpoint_format="gptq_v2"),
    "awq": awq,
    "nf4": lambda: bitsandbytes("nf4", torch.float32, nested=False),
    "nf4_nested": lambda: bitsandbytes("nf4", torch.bfloat16, nested=True),
    "fp4_nested": lambda: bitsandbytes("fp4", torch.float16, nested=True),
    **{f"compressed{b}": (lambda b=b: compressed(b, symmetric=True)) for b in (4, 8)},
    "compressed4_zeros": lambda: compressed(4, symmetric=False),
    "compressed_fp8": compressed_fp8,
    "fp8": fp8,
    "mxfp4": mxfp4,
}  # fmt: skip

if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        package, config, tensors, values = CASES[name]()
        held = {key: part.detach().contiguous() for key, part in tensors.items()} | {
            "values": values.detach()
        }
        metadata = {"package": f"{package} {version(package)}", "config": json.dumps(config)}
        save_file(held, HERE / f"{name}.safetensors", metadata)
        print(
            name,
            metadata["package"],
            {key: (list(part.shape), str(part.dtype)) for key, part in held.items()},
        )

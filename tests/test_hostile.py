"""Every truncation and every flipped bit of small files: an error of kbit's own, or what the reference readers read."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save

import tiny

pytest.importorskip("resource", reason="limits of processes are Unix's")

BATCH = 1000


def small_safetensors():
    """4 KiB: a header of 900 bytes, tensors of four types."""
    rng = np.random.default_rng(1)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": rng.normal(size=(9, 40)).astype(np.float32),
        "model.layers.0.input_layernorm.weight": rng.normal(size=200).astype(np.float16),
        "model.embed_tokens.weight": rng.integers(0, 1000, (10, 20), np.int64)[:0],
        "steps": rng.integers(0, 1000, 30, np.int64),
    }
    data = save(tensors, {"format": "pt", "text": 'a "quoted" \u00e9 \n'})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    # bf16, which NumPy lacks.
    more = rng.integers(0, 256, 900, np.uint8).tobytes()
    offsets = [len(body), len(body) + len(more)]
    header["bf16"] = {"dtype": "BF16", "shape": [3, 150], "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False).encode().ljust(1000)
    return len(text).to_bytes(8, "little") + text + body + more


def small_gguf(path):
    """4 KiB: all kinds of metadata, plain and quantised tensors."""
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_bool("flag", True)
    writer.add_uint64("long", 1 << 40)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "\u00e9", "", "word"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0, 0.0])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3, 4])
    writer.add_tensor("norm", rng.normal(size=70).astype(np.float32))
    writer.add_tensor("half", rng.normal(size=(5, 30)).astype(np.float16))
    for kind in (
        gguf.GGMLQuantizationType.Q4_K,
        gguf.GGMLQuantizationType.Q6_K,
        gguf.GGMLQuantizationType.Q8_0,
    ):
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = 1024 // elements
        raw = rng.integers(0, 64, (2, blocks // 2 * size), np.uint8)
        writer.add_tensor(f"blk.0.{kind.name}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def small_config():
    """4 KiB of config.json: a real one, and keys that change nothing."""
    config = tiny.CONFIG | {"torch_dtype": "bfloat16", "transformers_version": "5.17.0"}
    config["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    text = json.dumps(config, indent=2)
    config["_name_or_path"] = "x" * (4096 - len(text) - 24)
    return json.dumps(config, indent=2).encode()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["safetensors", "gguf", "config"])
def test_every_truncation_and_every_flip(kind, tmp_path, record_line):
    good = tmp_path / "good"
    match kind:
        case "safetensors":
            good.write_bytes(small_safetensors())
        case "gguf":
            small_gguf(good)
        case "config":
            good.write_bytes(small_config())
    size = good.stat().st_size
    assert 3500 <= size <= 4700
    cases = 9 * size
    script = Path(__file__).with_name("damage.py")

    def child(first):
        command = [sys.executable, script, kind, good, str(first), str(min(first + BATCH, cases))]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    total = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(child, range(0, cases, BATCH)):
            assert done.returncode == 0, done.stderr[-3000:]
            counts = json.loads(done.stdout)
            assert counts.pop("grown_kib") * 1024 <= (64 << 20) + 2 * size
            assert counts.pop("slowest") < 10.0
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
    assert total["cases"] == cases
    assert total["read"] + sum(n for name, n in total.items() if name.endswith("Error")) == cases
    assert total["ModelFormatError"] >= size
    record_line(f"damaged {kind}: " + ", ".join(f"{count} {name}" for name, count in total.items()))

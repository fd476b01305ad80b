"""GGUF written by kbit: read by the `gguf` package and by kbit, value for value and token for token."""

import json

import gguf
import numpy as np
import pytest

import kbit
import tiny
from kbit.converting import convert

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def read(path):
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def rotated(values, heads):
    """Halves of each head as pairs side by side, as llama.cpp has them."""
    per_head = values.reshape(heads, 2, -1, values.shape[-1])
    return per_head.swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
def test_a_directory_becomes_gguf(tmp_path, bits):
    directory = tmp_path / "model"
    tiny.make(directory)
    # The splitting of GPT-2, which has a name in GGUF.
    tokenizer = directory / "tokenizer.json"
    data = json.loads(tokenizer.read_text())
    data["pre_tokenizer"]["use_regex"] = True
    tokenizer.write_text(json.dumps(data))
    with kbit.load(directory, bits=bits) as model:
        types = convert(model, tmp_path / "model.gguf")
        found = read(tmp_path / "model.gguf")
        config = tiny.CONFIG
        assert found.keys() == types.keys()
        names = {
            "token_embd.weight": ("embed.weight", 0),
            "output_norm.weight": ("final_norm.weight", 0),
            "blk.1.attn_q.weight": ("layers.1.attn.q.weight", config["num_attention_heads"]),
            "blk.0.attn_k.weight": ("layers.0.attn.k.weight", config["num_key_value_heads"]),
            "blk.0.ffn_down.weight": ("layers.0.mlp.down.weight", 0),
        }
        for name, (canonical, heads) in names.items():
            values = model.weights[canonical].dequantize()
            values = rotated(values, heads) if heads else values
            assert np.array_equal(found[name], values), name
        if bits:
            assert types["blk.0.attn_q.weight"] == "Q8_0"
        expected = model.generate(np.array(PROMPT, np.uint32), max_new_tokens=20, temperature=0)
    with kbit.load(tmp_path / "model.gguf") as model:
        again = model.generate(np.array(PROMPT, np.uint32), max_new_tokens=20, temperature=0)
        if bits is None:
            assert again.token_ids == expected.token_ids
        ids = model.tokenize("Once upon a time", add_special_tokens=False)
    with kbit.load(directory) as model:
        assert np.array_equal(ids, model.tokenize("Once upon a time", add_special_tokens=False))


def test_gguf_there_and_back(shared, tmp_path):
    source = shared("models/stories260K/stories260Ktok512.gguf")
    with kbit.load(source) as model:
        convert(model, tmp_path / "copy.gguf")
        expected = model.generate("Once upon a time", max_new_tokens=60, temperature=0)
    before, after = read(source), read(tmp_path / "copy.gguf")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert np.array_equal(values, after[name]), name
    with kbit.load(tmp_path / "copy.gguf") as model:
        assert (
            model.generate("Once upon a time", max_new_tokens=60, temperature=0).text
            == expected.text
        )


def test_what_gguf_cannot_say_is_refused(tmp_path):
    directory = tiny.make(tmp_path / "model")
    with (
        kbit.load(directory) as model,
        pytest.raises(kbit.UnsupportedModelError, match="has a name for"),
    ):
        convert(model, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()

"""Loading: every form of the same checkpoint gives the same model, and a wrong one is refused with both sides named."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest

import kbit
import tiny
from kbit import loading

pytestmark = pytest.mark.core
IDS = np.arange(40, dtype=np.uint32) * 5 % 256


def logits(path, **options):
    with kbit.load(path, **options) as model:
        return model.forward(IDS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A bf16 directory with everything in one file."""
    return tiny.make(tmp_path_factory.mktemp("tiny") / "plain")


@pytest.fixture(scope="module")
def expected(plain):
    return logits(plain, dtype="f32")


# The same model in other forms


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_stored_types_and_shards(tmp_path, expected, dtype, shards):
    path = tiny.make(tmp_path / "m", dtype=dtype, shards=shards)
    assert np.array_equal(logits(path, dtype="f32"), expected)


def test_a_single_file_beside_its_config(plain, expected):
    assert np.array_equal(logits(plain / "model.safetensors", dtype="f32"), expected)


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_gguf(tmp_path, expected, kind):
    path = tiny.make_gguf(tmp_path / "m.gguf", kind)
    assert np.array_equal(logits(path, dtype="f32"), expected)
    with kbit.load(path) as model:
        assert model.eos_token_ids == (257,)
        assert model.detokenize(model.tokenize("héllo  w")) == "héllo  w"


def test_gguf_directory_with_one_file(tmp_path, expected):
    tiny.make_gguf(tmp_path / "m.gguf")
    assert np.array_equal(logits(tmp_path, dtype="f32"), expected)


def test_gguf_keeps_its_own_bits(tmp_path):
    path = tiny.make_gguf(tmp_path / "m.gguf", "Q8_0")
    with kbit.load(path) as model:
        assert model.weights["layers.0.mlp.up.weight"].bits == 8
        assert model.nbytes < 1.15 * sum(t["bytes"] for t in tensors_of(path))


def tensors_of(path):
    file = kbit._core.TensorFile(path)
    return [{"name": n, "bytes": file.nbytes(n)} for n in file.names()]


def test_a_tied_head_is_the_embedding(tmp_path):
    def copy_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    tied = logits(tiny.make(tmp_path / "tied", tied=True), dtype="f32")
    untied = logits(tiny.make(tmp_path / "untied", change=copy_head), dtype="f32")
    assert np.array_equal(tied, untied)


def test_both_spellings_of_the_rope(tmp_path, plain, expected):
    old = json.loads((plain / "config.json").read_text())
    del old["rope_parameters"]
    old |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    path = tiny.make(tmp_path / "old")
    (path / "config.json").write_text(json.dumps(old))
    assert np.array_equal(logits(path, dtype="f32"), expected)


def test_stored_dtype_runs_close_to_f32(plain, expected):
    exact = logits(plain, kv="f32")
    assert np.array_equal(exact, expected)  # dense bf16 weights are converted exactly


@pytest.mark.parametrize("kv", ["f32", "f16", "bf16", "int8"])
def test_every_type_of_the_cache(plain, expected, kv):
    found = logits(plain, kv=kv)
    assert np.isfinite(found).all()
    assert np.array_equal(found, expected) == (kv == "f32")


def test_a_type_of_cache_that_is_none(plain):
    with pytest.raises(ValueError, match=r"kv must be .* 'int8', is 'i8'"):
        kbit.load(plain, kv="i8")


# Quantised


@pytest.mark.parametrize("bits", range(2, 9))
def test_saved_and_reloaded_is_the_same_to_the_bit(tmp_path, plain, bits):
    with kbit.load(plain, bits=bits) as model:
        before = model.forward(IDS)
        text = model.generate("abc", max_new_tokens=8).token_ids
        claimed = model.bits_per_weight
        model.save(tmp_path / "saved")
        stored = (tmp_path / "saved" / "model.safetensors").stat().st_size
        nbytes = model.nbytes
    with kbit.load(tmp_path / "saved") as again:
        assert np.array_equal(again.forward(IDS), before)
        assert again.generate("abc", max_new_tokens=8).token_ids == text
        assert again.bits_per_weight == claimed
        assert again.spec == model.spec
    header = (
        64 * 1024
    )  # the tiny model's header outweighs the two per cent that real ones are held to
    assert nbytes <= stored <= nbytes + header


def test_widths_land_where_the_plan_says(plain):
    with kbit.load(plain, bits={"lm_head": 8, "mlp.down": 3, "*": 4}) as model:
        bits = {name: weight.bits for name, weight in model.weights.items()}
    assert bits["head.weight"] == 8
    assert bits["embed.weight"] == 5
    assert bits["layers.1.mlp.down.weight"] == 3
    assert bits["layers.1.attn.q.weight"] == 4
    assert bits["final_norm.weight"] is None


def test_quantising_gguf_and_saving_it_keeps_the_tokenizer(tmp_path):
    path = tiny.make_gguf(tmp_path / "m.gguf")
    with kbit.load(path, bits=4) as model:
        model.save(tmp_path / "saved")
        expected = model.generate("ab", max_new_tokens=6)
    with kbit.load(tmp_path / "saved") as again:
        assert again.generate("ab", max_new_tokens=6).token_ids == expected.token_ids
        assert again.eos_token_ids == model.eos_token_ids


def test_saving_over_itself(tmp_path, plain):
    with kbit.load(plain, bits=4) as model:
        model.save(tmp_path / "saved")
        before = model.forward(IDS)
    with kbit.load(tmp_path / "saved") as model:
        model.save(tmp_path / "saved")
    assert np.array_equal(logits(tmp_path / "saved"), before)


def test_a_saved_model_keeps_its_widths(tmp_path, plain):
    with kbit.load(plain, bits=4) as model:
        model.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="keeps its own widths"):
        kbit.load(tmp_path / "saved", bits=3)


def test_pickles_by_path_and_options(plain):
    with kbit.load(plain, bits={"*": 5}, threads=1) as model:
        data = pickle.dumps(model)
        before = model.forward(IDS)
    assert len(data) < 2000
    with pickle.loads(data) as again:
        assert np.array_equal(again.forward(IDS), before)
        assert again.engine.threads == 1


def test_repr_tells_what_it_is(plain):
    with kbit.load(plain, bits=4) as model:
        text = repr(model)
    assert re.search(r"plain: 2 layers of 64, 0\.1 M weights at \d\.\d\d bits", text)
    assert re.search(r"plain: 2 layers", repr(model))  # closed, and still says so


def test_without_a_tokenizer_it_works_on_ids(tmp_path):
    path = tiny.make(tmp_path / "m", text=False)
    with kbit.load(path) as model:
        assert len(model.generate(IDS, max_new_tokens=3, ignore_eos=True).token_ids) == 3
        with pytest.raises(ValueError, match="no tokenizer beside the weights"):
            model.generate("text")


# generation_config.json


def test_generation_config_gives_the_defaults(tmp_path):
    config = {"do_sample": True, "temperature": 0.5, "top_k": 7, "eos_token_id": [3, 257]}
    path = tiny.make(tmp_path / "m", generation_config=config)
    with kbit.load(path) as model:
        assert (model.defaults.temperature, model.defaults.top_k) == (0.5, 7)
        assert set(model.eos_token_ids) == {3, 257}


def test_wrong_generation_config_is_named(tmp_path):
    path = tiny.make(tmp_path / "m", generation_config={"do_sample": True, "top_p": 7.0})
    with pytest.raises(kbit.ModelFormatError, match=r"generation_config\.json: top_p = 7"):
        kbit.load(path)


# What is refused


def test_missing_and_left_over_tensors_are_listed(tmp_path):
    def rename(tensors):
        tensors["model.layers.1.mlp.strange.weight"] = tensors.pop(
            "model.layers.1.mlp.up_proj.weight"
        )

    path = tiny.make(tmp_path / "m", change=rename)
    with pytest.raises(kbit.ModelFormatError) as caught:
        kbit.load(path)
    assert "model.layers.1.mlp.strange.weight" in str(caught.value)
    assert "layers.1.mlp.up.weight" in str(caught.value)


def test_a_wrong_shape_names_both_sides(tmp_path):
    def shrink(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][:-1]

    path = tiny.make(tmp_path / "m", change=shrink)
    with pytest.raises(kbit.ModelFormatError, match=r"layers\.0\.mlp\.up.*9[56].*9[56]"):
        kbit.load(path)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("/no/such/directory", FileNotFoundError, "no such file or directory"),
        ("no-such-model", FileNotFoundError, "not written like a hub id"),
    ],
)
def test_names_that_lead_nowhere(name, error, says):
    with pytest.raises(error, match=says):
        kbit.load(name)


def test_a_hub_id_offline(tmp_path):
    with pytest.raises(OSError, match="somebody/something: not in the local cache"):
        kbit.load("somebody/something", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(OSError, match="not in the local cache"):
        kbit.load("somebody/something/x.gguf", cache_dir=tmp_path, local_files_only=True)


def test_a_hub_id_in_the_cache(tmp_path, plain, expected):
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / ("a" * 40)
    shutil.copytree(plain, snapshot)
    refs = tmp_path / "models--somebody--something" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    found = logits("somebody/something", cache_dir=tmp_path, local_files_only=True, dtype="f32")
    assert np.array_equal(found, expected)


def test_pickled_weights_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(kbit.ModelFormatError, match="pickled code"):
        kbit.load(tmp_path)


def test_an_empty_directory(tmp_path):
    with pytest.raises(kbit.ModelFormatError, match=r"no model\.safetensors"):
        kbit.load(tmp_path)


def test_several_files_and_no_index(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    with pytest.raises(kbit.ModelFormatError, match=r"2 weight files \(a\.gguf, b\.gguf\)"):
        kbit.load(tmp_path)


def test_weights_without_a_config(tmp_path, plain):
    shutil.copy(plain / "model.safetensors", tmp_path)
    with pytest.raises(kbit.ModelFormatError, match=r"no config\.json beside model\.safetensors"):
        kbit.load(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", 7, "x.bin"])
def test_an_index_that_leaves_the_directory(tmp_path, plain, file):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    index = {"weight_map": {"model.norm.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(kbit.ModelFormatError, match="is no file of the directory"):
        kbit.load(tmp_path)


def test_an_index_that_tells_stories(tmp_path):
    path = tiny.make(tmp_path / "m", shards=2)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(kbit.ModelFormatError, match=r"model\.extra\.weight"):
        kbit.load(path)


def test_the_same_tensor_in_two_shards(tmp_path):
    path = tiny.make(tmp_path / "m", shards=2)
    first = path / "model-00001-of-00002.safetensors"
    names = tiny.weights()
    tiny.write_safetensors(first, dict(list(names.items())[:4]), "BF16")
    with pytest.raises(kbit.ModelFormatError, match=r"is in .*00001.* and in .*00002"):
        kbit.load(path)


def test_an_unknown_architecture_names_the_nearest(tmp_path):
    path = tiny.make(tmp_path / "m", config={"model_type": "lama"})
    with pytest.raises(kbit.UnsupportedModelError, match=r"'lama'.*'llama'"):
        kbit.load(path)


def test_strict_refuses_unknown_keys(tmp_path):
    path = tiny.make(tmp_path / "m", config={"frobnicate": 3})
    kbit.load(path).close()
    with pytest.raises(kbit.UnsupportedModelError, match="frobnicate"):
        kbit.load(path, strict=True)


@pytest.mark.parametrize("context", [0, -1, 129])
def test_context_out_of_range(plain, context):
    with pytest.raises(ValueError, match=rf"context = {context} is not in 1\.\.128"):
        kbit.load(plain, context=context)


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_threads_out_of_range(plain, threads):
    with pytest.raises(ValueError, match=rf"threads = {threads} is not in 1\.\.256"):
        kbit.load(plain, threads=threads)


@pytest.mark.parametrize(
    "options", [{"kv": "f8"}, {"activations": "int4"}, {"device": "tpu"}, {"dtype": "f64"}]
)
def test_words_that_are_none_of_the_choices(plain, options):
    (value,) = options.values()
    with pytest.raises((ValueError, kbit.DeviceError), match=value):
        kbit.load(plain, **options)


def test_unknown_arguments_raise(plain):
    with pytest.raises(TypeError, match="load_in_4bit"):
        kbit.load(plain, load_in_4bit=True)


def test_memory_budget(plain):
    with kbit.load(plain, bits=4) as model:
        weights = model.nbytes
    with pytest.raises(kbit.MemoryBudgetError, match=str(weights // 2)):
        kbit.load(plain, bits=4, memory=weights // 2)
    with kbit.load(plain, bits=4, memory=weights + 4_000_000) as model:
        assert model.generate("a", max_new_tokens=4).token_ids


@pytest.mark.parametrize("value", ["lots", "-1", 0, "0GB", "1XB", True])
def test_memory_that_is_no_amount(plain, value):
    with pytest.raises(ValueError, match="memory"):
        kbit.load(plain, memory=value)


@pytest.mark.parametrize(
    ("text", "amount"), [("1k", 1000), ("2 GB", 2 * 10**9), ("3MiB", 3 << 20), (7, 7), ("9b", 9)]
)
def test_amounts_of_memory(text, amount):
    assert loading.parse_bytes(text) == amount


def test_a_pattern_that_fits_nothing(plain):
    with pytest.raises(ValueError, match=r"no weight fits 'lm_haed'"):
        kbit.load(plain, bits={"lm_haed": 8, "*": 4})

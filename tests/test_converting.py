"""GGUF written by kbit: read by the `gguf` package and by kbit, value for value and token for token.

With llama.cpp itself, which is no test dependency: benches/beside_llama.py.
"""

import json

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

import kbit
import tiny
from kbit.converting import convert
from kbit.text import gguf_export, sentencepiece
from kbit.text.merges import merges_from_scores
from nasty import nasty

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


SENTENCEPIECE = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "bpe without prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n\n", "▁▁"],
    },
    "unigram": {"model_type": "unigram", "remove_extra_whitespaces": True},
}
"""As Llama 2 and Mistral, Gemma, and T5."""


def train(root, name, **options):
    """A directory with tokenizer.model, and the library's tokenizer."""
    library = pytest.importorskip("sentencepiece")
    root.mkdir()
    lines = root / "text"
    lines.write_text("\n".join(x.replace("\n", " ") for x in nasty(3000, seed=1)), encoding="utf-8")
    library.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(root / "tokenizer"),
        vocab_size=700,
        character_coverage=0.98,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **{"remove_extra_whitespaces": False, **SENTENCEPIECE[name], **options},
    )
    return library.SentencePieceProcessor(model_file=str(root / "tokenizer.model"))


def write_tokenizer_json(root, name):
    """The tokenizer.json that transformers makes of a SentencePiece model, in place of it."""
    model = sentencepiece.parse((root / "tokenizer.model").read_bytes())
    (root / "tokenizer.model").unlink()
    if name == "unigram":
        vocab = list(zip(model.tokens, model.scores, strict=True))
        core = Tokenizer(models.Unigram(vocab, 0, byte_fallback=False))
        core.normalizer = normalizers.Sequence(
            [normalizers.Precompiled(model.charsmap), normalizers.Replace(Regex(" {2,}"), " ")]
        )
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        scores = {
            t: s
            for t, s, k in zip(model.tokens, model.scores, model.types, strict=True)
            if k in (1, 4)  # normal, user-defined
        }
        vocab = {token: i for i, token in enumerate(model.tokens)}
        core = Tokenizer(
            models.BPE(
                vocab,
                merges_from_scores(scores),
                byte_fallback=True,
                fuse_unk=True,
                unk_token="<unk>",
            )
        )
        steps = [normalizers.Replace(" ", "▁")]
        if name == "bpe":
            steps = [normalizers.Prepend("▁"), *steps]
        core.normalizer = normalizers.Sequence(steps)
        own = [
            AddedToken(t, normalized=False)
            for t, k in zip(model.tokens, model.types, strict=True)
            if k == 4
        ]
        core.add_tokens(own)
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    core.save(str(root / "tokenizer.json"))


@pytest.mark.parametrize("source", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_becomes_gguf(name, source, tmp_path):
    """The keys that llama.cpp's own converter writes, and the ids of the library after reading them."""
    theirs = train(tmp_path / "m", name)
    if source == "tokenizer.json":
        write_tokenizer_json(tmp_path / "m", name)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": "hi"}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(names))
    size = theirs.get_piece_size()
    keys = gguf_export.metadata(tmp_path / "m", size + 4)
    get = lambda key: keys.get(f"tokenizer.ggml.{key}")  # noqa: E731
    assert get("model") == ("t5" if name == "unigram" else "llama")
    assert get("add_space_prefix") is (name != "bpe without prefix")
    assert (get("bos_token_id"), get("eos_token_id"), get("unknown_token_id")) == (1, 2, 0)
    assert get("add_bos_token") is True
    assert keys["tokenizer.chat_template"] == "hi"
    assert len(get("tokens")) == len(get("scores")) == len(get("token_type")) == size + 4
    assert get("token_type")[:3] == [2, 3, 3]
    assert get("token_type")[-4:] == [5] * 4
    own = [get("tokens")[i] for i, kind in enumerate(get("token_type")) if kind == 4]
    assert sorted(own) == (["\n\n", "  "] if name == "bpe without prefix" else [])
    if name != "unigram":
        assert get("token_type").count(6) == 256
    if source == "tokenizer.model":
        assert (
            np.allclose(get("scores")[5:size], [theirs.get_score(i) for i in range(5, size)]) or own
        )
    ours = kbit.text.Tokenizer.from_gguf(keys)
    for text in nasty(1000, seed=3):
        if "▁" in text or text != text.strip(" "):
            continue  # a user-defined ▁▁ is two spaces in GGUF; Metaspace puts no second space first
        ids, expected = ours.encode(text, add_bos=False).tolist(), theirs.encode(text)
        if name == "unigram":  # two ways may be as likely: docs/text.md
            sums = [sum(theirs.get_score(i) for i in way) for way in (ids, expected)]
            assert sums[0] == pytest.approx(sums[1], rel=1e-6), text
        else:
            assert ids == expected, text


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("bpe", {"byte_fallback": False}, "without a token for each byte"),
        ("bpe", {"normalization_rule_name": "nfkc"}, "normalisation"),
        ("bpe", {"remove_extra_whitespaces": True}, "'a  b   c' would be"),
        ("unigram", {"byte_fallback": True}, "a Unigram model with bytes"),
        ("unigram", {"add_dummy_prefix": False}, "puts none before"),
        ("unigram", {"treat_whitespace_as_suffix": True}, "would be the tokens"),
    ],
)
def test_sentencepiece_that_llama_cpp_runs_otherwise_is_refused(name, options, says, tmp_path):
    size = train(tmp_path / "m", name, **options).get_piece_size()
    with pytest.raises(kbit.UnsupportedModelError, match=says) as caught:
        gguf_export.metadata(tmp_path / "m", size)
    assert "kbit convert SRC DIRECTORY" in str(caught.value)


def test_a_token_beyond_the_embedding_is_refused(tmp_path):
    size = train(tmp_path / "m", "bpe").get_piece_size()
    with pytest.raises(
        kbit.ModelFormatError, match=f"is token {size - 1}, the model has {size - 1}"
    ):
        gguf_export.metadata(tmp_path / "m", size - 1)


def test_merges_that_rank_pairs_are_refused(tmp_path):
    train(tmp_path / "m", "bpe")
    write_tokenizer_json(tmp_path / "m", "bpe")
    file = tmp_path / "m" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["merges"] = data["model"]["merges"][1:]
    file.write_text(json.dumps(data))
    with pytest.raises(kbit.UnsupportedModelError, match=r"with its tokenizer\.model"):
        gguf_export.metadata(tmp_path / "m", 4000)


def test_what_gguf_cannot_say_is_refused(tmp_path):
    directory = tiny.make(tmp_path / "model")
    with (
        kbit.load(directory) as model,
        pytest.raises(
            kbit.UnsupportedModelError, match="no words for byte-level BPE that splits text by"
        ),
    ):
        convert(model, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()

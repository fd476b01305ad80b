"""Models that kbit writes as GGUF, run by llama.cpp: the same tokens of a text, the same greedy continuation.

    python benches/beside_llama.py                        builds llama.cpp under .cache/compare the first time
    python benches/beside_llama.py --llama DIR            with llama-completion and llama-tokenize from DIR

Where the continuations part, the two best logits of kbit at that token and their distance are shown: it must be a
near-tie, at most NEAR of the logits' standard deviation. Anything else ends the run with an error. Needs the test
group of pyproject.toml and ../shared; no timings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import peers

import kbit
from kbit._core import TensorFile
from kbit.converting import convert
from kbit.text import gguf_export

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from golden_weights import weights  # noqa: E402
from nasty import nasty  # noqa: E402

SHARED = Path(os.environ.get("KBIT_SHARED", ROOT.parent / "shared"))
PROMPT = "Once upon a time"
CASES = (
    *(
        "llama",
        "mixtral",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "phi",
        "phi3",
        "gpt2",
        "gpt_neox",
        "bloom",
        "olmo",
    ),
    *(
        "olmo2",
        "stablelm",
        "starcoder2",
        "granite",
        "smollm3",
        "glm4",
        "cohere2",
        "seed_oss",
        "arcee",
    ),
)
"""Golden models that are given random weights and Llama 2's tokenizer: those whose config llama.cpp can run."""
VOCABULARY = ("embed_tokens", "embed_in", "embed_out", "wte", "word_embeddings.", "lm_head")
"""In the names of tensors with a row a token."""
EXACT = "--temp 0 -no-cnv --no-display-prompt --simple-io -t 2 -fa off -ctk f32 -ctv f32"
"""Greedy, with attention in f32."""
IDS = "--ids --no-bos --no-parse-special --no-escape --log-disable"
NEAR = {"f32": 1e-3, "q8": 5e-2}
"""Of the logits' standard deviation. llama.cpp rounds activations to 8 bits for quantised weights."""


def llama(binaries: Path, program: str, *args: str | Path) -> bytes:
    """What a program of llama.cpp prints."""
    command = [str(binaries / program), *map(str, args)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace")[-2000:]
        sys.exit(f"beside_llama: {' '.join(command)} failed ({done.returncode}):\n{said}")
    return done.stdout


def random_model(root: Path, case: str, tokenizer: Path | None) -> Path:
    """A directory with the architecture of a golden model, random weights and a real tokenizer (or Llama 2's)."""
    root.mkdir()
    if tokenizer is None:
        write_llama_2_tokenizer(root)
    else:
        (root / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
        (root / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    vocabulary = json.loads((root / "tokenizer.json").read_bytes())
    size = 1 + max(vocabulary["model"]["vocab"].values()) + len(vocabulary["added_tokens"])
    metadata = TensorFile(ROOT / f"tests/golden/{case}.safetensors").metadata
    config = json.loads(metadata["config"])
    shapes = {
        name: [size, *shape[1:]] if any(part in name for part in VOCABULARY) else shape
        for name, shape in json.loads(metadata["tensors"]).items()
    }
    config["vocab_size"] = size
    if config.get("sliding_window"):  # llama.cpp computes no window for some of these
        config["sliding_window"] = config["max_position_embeddings"]
    (root / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import save_file

    save_file(weights(shapes, 7), root / "model.safetensors")
    return root


def write_llama_2_tokenizer(root: Path) -> None:
    """Llama 2's tokenizer.json, from the vocabulary and scores of the GGUF file beside the given vectors."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    from kbit.text.merges import merges_from_scores

    keys = TensorFile(SHARED / "tokenizers/gguf-vocab/ggml-vocab-llama-spm.gguf").metadata
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    scores = {
        t: s for t, s, k in zip(tokens, keys["tokenizer.ggml.scores"], kinds, strict=True) if k == 1
    }
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(
        models.BPE(
            vocab, merges_from_scores(scores), byte_fallback=True, fuse_unk=True, unk_token="<unk>"
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    core.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )


def texts(count: int) -> list[str]:
    """The probes of a conversion and nasty strings; composed, because llama.cpp does not normalise."""
    import unicodedata

    made = [unicodedata.normalize("NFC", text) for text in nasty(count, seed=12)]
    return [*gguf_export.PROBES, *(text for text in made if text and "\0" not in text)]


def same_tokens(binaries: Path, model: kbit.Model, gguf: Path, count: int) -> str:
    """How many texts have the same ids in both."""
    equal, total, first = 0, 0, ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        for text in texts(count):
            file.write_bytes(text.encode())
            found = llama(binaries, "llama-tokenize", "-m", gguf, "-f", file, *IDS.split())
            total += 1
            same = json.loads(found) == model.tokenize(text, add_special_tokens=False).tolist()
            equal += same
            first = first or ("" if same else f"; first of the others {text!r:.60}")
    return f"{equal}/{total}{first}"


def compare(
    binaries: Path, model: kbit.Model, gguf: Path, length: int, count: int, near: float
) -> list[str]:
    """A row: tokens of texts, agreement of the greedy continuation, and the near-tie that ends it."""
    types = convert(model, gguf)
    ids = model.tokenize(PROMPT)
    length = min(length, model.spec.max_position_embeddings - len(ids))
    done = model.generate(ids, max_new_tokens=length, temperature=0)
    ours = [model.tokenizer.token_bytes(i, special=False) or b"" for i in done.token_ids]
    # A few tokens more than are compared: the last ones may not be printed whole.
    size = ["-n", str(length + 4), "-c", str(len(ids) + length + 16)]
    theirs = llama(binaries, "llama-completion", "-m", gguf, "-p", PROMPT, *size, *EXACT.split())
    kinds = " ".join(sorted(set(types.values())))
    tokens = same_tokens(binaries, model, gguf, count) if count else ""
    agreed = 0
    while agreed < len(ours) and theirs.startswith(b"".join(ours[: agreed + 1])):
        agreed += 1
    rest = theirs[len(b"".join(ours)) :].strip()
    if agreed == len(ours) and (len(ours) == length or rest in (b"", b"[end of text]")):
        return [kinds, tokens, f"all {agreed}{' and the end' if len(ours) < length else ''}", ""]
    logits = model.forward(np.concatenate([ids, np.array(done.token_ids[:agreed], np.uint32)]))[-1]
    best, second = np.argsort(logits)[::-1][:2]
    gap = float((logits[best] - logits[second]) / logits.std())
    two = (f"{logits[i]:.4f} {model.tokenizer.token(int(i))!r}" for i in (best, second))
    tie = f"{', '.join(two)}: {gap:.1e}"
    if gap > near:
        sys.exit(f"beside_llama: {gguf.name} parts after {agreed} tokens at no near-tie: {tie}")
    return [kinds, tokens, f"{agreed} of {len(ours)}", tie]


def main() -> None:
    """Run it."""
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument(
        "--llama", type=Path, help="directory of llama.cpp's programs; default: built under --cache"
    )
    ask.add_argument(
        "--cache", type=Path, default=ROOT / ".cache/compare", help="where llama.cpp is kept"
    )
    ask.add_argument("--tokens", type=int, default=200, help="tokens of a continuation")
    ask.add_argument("--texts", type=int, default=100, help="nasty strings whose ids are compared")
    args = ask.parse_args()
    binaries = args.llama or peers.llama(args.cache, jobs=os.cpu_count() or 1).native
    stories, small = (
        SHARED / "models/kbit-stories",
        SHARED / "models/stories260K/stories260Ktok512.gguf",
    )
    print(
        "| model | GGUF types | texts with equal ids | equal greedy tokens | near-tie: best, second, gap / std |\n"
        "|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        neox = random_model(root / "neox", "gpt_neox", SHARED / "tokenizers/gpt-neox-20b")
        # llama.cpp takes a model that is called phi-3 for one with Phi 3's control tokens.
        goldens = {
            case: random_model(root / f"random{i}", case, None) for i, case in enumerate(CASES)
        }
        cases = [
            ("kbit-stories", stories, {"dtype": "f32"}, "f32"),
            *((f"kbit-stories, {b} bits", stories, {"bits": b}, "q8") for b in (8, 4)),
            ("stories260K", small, {}, "f32"),
            ("gpt_neox, random, tokenizer of GPT-NeoX 20B", neox, {"dtype": "f32"}, "f32"),
            *(
                (f"{case}, random, tokenizer of Llama 2", path, {"dtype": "f32"}, "f32")
                for case, path in goldens.items()
            ),
        ]
        seen: set[Path] = set()
        for i, (name, path, options, near) in enumerate(cases):
            exact = {"activations": "f32"} if "bits" in options else {}
            with kbit.load(path, kv="f32", **options, **exact) as model:
                count = 0 if path in seen or path in list(goldens.values())[1:] else args.texts
                row = compare(binaries, model, root / f"{i}.gguf", args.tokens, count, NEAR[near])
            seen.add(path)
            print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

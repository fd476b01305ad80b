"""The command line: what it prints, its JSON, its exit codes."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import kbit
import tiny
from kbit import cli

PROMPT = "Once upon a time"


@pytest.fixture
def run(capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def run(*argv):
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as end:
            code = end.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def run_json(run):
    """Runs a command with --json that must succeed; the object it prints."""

    def run_json(*argv):
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        return json.loads(out)

    return run_json


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("cli") / "plain")


# generate and chat


def test_generate_streams_the_text_and_tells_the_speed(run, stories):
    code, out, err = run("generate", PROMPT, "--max-new-tokens", 12)
    assert code == 0
    assert out == PROMPT + stories.generate(PROMPT, max_new_tokens=12).text + "\n"
    assert "[12 tokens at " in err
    assert "tokens/s" in err


def test_generate_json(run_json, stories):
    found = run_json("generate", PROMPT, "-n", 12, "-t", 0.8, "--seed", 3, "--top-k", 40)
    expected = stories.generate(PROMPT, max_new_tokens=12, temperature=0.8, seed=3, top_k=40)
    assert found["text"] == expected.text
    assert found["token_ids"] == expected.token_ids
    assert found["finish_reason"] == "length"
    assert found["timings"]["decode_tokens_per_second"] > 0


def test_generate_with_a_model_and_stop(run, plain):
    with kbit.load(plain, bits=3) as model:
        whole = model.generate("abc", max_new_tokens=9).text
    code, out, _ = run("generate", plain, "abc", "-n", 9, "--bits", 3, "--stop", whole[4:6])
    assert code == 0
    assert out == "abc" + whole[: whole.index(whole[4:6])] + "\n"


def test_generate_reads_standard_input(run, stories, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    code, out, _ = run("generate", "-", "-n", 4)
    assert (code, out) == (0, PROMPT + stories.generate(PROMPT, max_new_tokens=4).text + "\n")


def test_the_known_story(run, shared):
    path = shared("models/stories260K/stories260Ktok512.gguf")
    code, out, _ = run("generate", path, PROMPT, "--max-new-tokens", 60, "--temperature", 0)
    assert code == 0
    assert out.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park"
    )


def test_chat_answers_each_line(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd you?\n\nnever read\n"))
    code, out, _ = run("chat", "--system", "Be kind.", "-n", 5, "--json")
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 2
    assert all(len(a["token_ids"]) <= 5 for a in answers)


# quantize, inspect, perplexity


def test_quantize_writes_what_it_says(run_json, run, tmp_path, plain):
    report = run_json("quantize", plain, tmp_path / "q", "--bits", "lm_head=8,*=4")
    file = tmp_path / "q" / "model.safetensors"
    assert report["file_bytes"] == file.stat().st_size
    with kbit.load(tmp_path / "q") as model:
        assert model.weights["head.weight"].bits == 8
        assert model.bits_per_weight == report["bits_per_weight"]
    code, out, _ = run("inspect", tmp_path / "q", "--tensors")
    assert code == 0
    assert "format: kbit" in out
    assert "layers.0.attn.q.weight" in out


def test_inspect_gives_the_bits_of_a_saved_model(run_json):
    found = run_json("inspect")
    with kbit.load() as model:
        sizes = {name: weight.shape for name, weight in model.weights.items()}
        assert found["parameters"] == model.num_parameters
        assert found["bits_per_weight"] == pytest.approx(model.bits_per_weight, abs=0.01)
    for tensor in found["tensors"]:
        if tensor["name"] in sizes:
            weights = np.prod(sizes[tensor["name"]])
            assert tensor["bits"] == pytest.approx(8 * tensor["bytes"] / weights, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("pytorch_model.bin", b"\x80\x02}q\x00.", "pickled code that kbit never opens; save it as"),
        (
            "model.safetensors",
            b"<!doctype html>",
            "neither GGUF nor safetensors; it begins with b'<!doctyp'",
        ),
    ],
)
def test_a_file_that_is_no_model_is_named(run, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    code, _, err = run("inspect", tmp_path / name)
    assert code != 0
    assert says in err


def test_quantize_real_model_is_as_small_as_it_claims(run_json, tmp_path, shared):
    for bits in (2, 4, 8):
        report = run_json("quantize", shared("models/kbit-stories"), tmp_path / "q", "--bits", bits)
        claimed = report["bits_per_weight"] * report["parameters"] / 8
        assert abs(report["file_bytes"] / claimed - 1) < 0.02


def test_inspect_tells_what_runs(run_json, plain, tmp_path):
    found = run_json("inspect", plain, "--context", 64)
    assert found["runs"] == "yes"
    assert found["architecture"] == "llama"
    assert found["sizes"]["hidden_size"] == 64
    assert found["bits_per_weight"] == 16
    assert found["cache_bytes"] == {
        "positions": 64,
        "f32": 32768,
        "f16": 16384,
        "bf16": 16384,
        "int8": 10240,
    }
    assert found["memory_bytes"] == found["tensor_bytes"] + 16384
    assert {tensor["bits"] for tensor in found["tensors"]} == {16}
    assert found["parameters"] == sum(w.size for w in tiny.weights().values())
    tiny.make(tmp_path / "bad", config={"model_type": "lama"})
    assert found["tensors"][0]["dtype"] == "BF16"
    assert "'llama'" in run_json("inspect", tmp_path / "bad")["runs"]
    gguf = run_json("inspect", tiny.make_gguf(tmp_path / "m.gguf", "Q8_0"))
    assert gguf["runs"] == "yes"
    assert gguf["tensor_types"]["Q8_0"] == 16


def test_perplexity_table(run, run_json, plain, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    found = run_json("perplexity", plain, text, "--bits", 8, 4, 2, "--window", 32)
    rows = found["rows"]
    assert [r["bits"] for r in rows] == ["as stored", "8", "4", "2"]
    assert rows[0]["kl"] is None
    assert 0 <= rows[1]["kl"] < rows[2]["kl"] < rows[3]["kl"]
    assert rows[0]["bits_per_weight"] > rows[1]["bits_per_weight"] > rows[2]["bits_per_weight"]
    with kbit.load(plain, kv="f32") as model:
        expected = model.perplexity(text.read_text(), window=32)
    assert rows[0]["perplexity"] == pytest.approx(expected, rel=1e-6)
    code, out, _ = run("perplexity", plain, text, "--limit", 64)
    assert code == 0
    assert out.splitlines()[0].split() == [
        "bits",
        "bits/weight",
        "bytes",
        "perplexity",
        "change",
        "KL",
    ]


def test_perplexity_beside_other_models(run, run_json, plain, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    saved = tmp_path / "saved"
    with kbit.load(plain, bits=3) as model:
        model.save(saved)
        context = model.context
    found = run_json("perplexity", plain, text, "--bits", 3, "--models", saved)
    assert found["window"] == min(256, context)
    rows = found["rows"]
    assert [row.pop("bits") for row in rows] == ["as stored", "3", str(saved)]
    assert rows[2] == rows[1] != rows[0]
    stories = kbit.__path__[0] + "/models/stories"
    code, _, error = run("perplexity", plain, text, "--models", stories)
    assert code == 1
    assert "same vocabulary" in error


# bench and doctor


def test_bench_counts_real_tokens(run, run_json, plain):
    found = run_json("bench", plain, "--prompt-tokens", 16, "--new-tokens", 8, "--repeat", 2)
    assert (
        found["decode_tokens_per_second"]["best"] >= found["decode_tokens_per_second"]["median"] > 0
    )
    code, out, _ = run("bench", plain, "--prompt-tokens", 16, "--new-tokens", 8, "--batch", 3)
    assert code == 0
    assert "prefill" in out
    assert "GB/s" in out


def test_doctor_tries_it(run, run_json, stories):
    found = run_json("doctor")
    assert found["well"] is True
    assert found["chosen"] in found["instruction_sets"].split(", ")
    assert found["kbit_version"] == kbit.__version__
    expected = stories.generate(PROMPT, max_new_tokens=32).text
    assert found["self_check"]["text"] == PROMPT + expected
    code, out, _ = run("doctor")
    assert code == 0
    assert "instruction_sets: scalar" in out


# Exit codes


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["generate"],
        ["generate", "x", "--temperature", "-1"],
        ["generate", "x", "--top-p", "0"],
        ["generate", "x", "--bits", "9"],
        ["generate", "x", "--bits", "lm_head=huge"],
        ["generate", "x", "--bits", "4", "--dtype", "f32"],
        ["generate", "x", "--memory", "plenty"],
        ["generate", "x", "--threads", "0"],
        ["quantize", "a", "b"],
        ["perplexity", "x", "--window", "1"],
        ["bench", "--new-tokens", "1"],
        ["bench", "--prompt-tokens", "1000000"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_two(run, argv):
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert err.startswith("kbit")
    assert "--help explains" in err
    assert len(err.splitlines()) == 2
    assert "Traceback" not in err


def test_an_unknown_log_level_is_wrong_usage(run, monkeypatch):
    monkeypatch.setenv("KBIT_LOG", "loud")
    code, out, err = run("generate", PROMPT, "-n", 1)
    assert (code, out) == (2, "")
    assert "KBIT_LOG=loud is none of debug, info" in err


def test_a_target_that_cannot_be_written_is_told_before_the_work(run, plain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(cli.quantize, "load_model", None)  # never reached
    code, _, err = run("quantize", plain, tmp_path / "file" / "out", "--bits", 4)
    assert code == 1
    assert f"Not a directory: '{tmp_path / 'file'}'" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["generate", "/no/such/model", "x"], "no such file or directory"),
        (["perplexity", "/no/such/text"], "/no/such/text"),
        (["inspect", "nothing"], "not written like a hub id"),
        (["quantize", "/no/such", "/tmp/x", "--bits", "4"], "no such file"),
        (["generate", "", "-n", "4"], "empty"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_failure_is_one_sentence_and_one(run, argv, says):
    code, _, err = run(*argv)
    assert code == 1
    assert err.startswith("kbit: error: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_broken_file_fails_politely(run, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    code, _, err = run("generate", tmp_path / "x.gguf", "x")
    assert code == 1
    assert err.startswith("kbit: error: ")


@pytest.mark.parametrize(
    "name", ["", "generate", "chat", "quantize", "inspect", "perplexity", "bench", "doctor"]
)
def test_help_teaches(run, name):
    code, out, _ = run(*([name] if name else []), "--help")
    assert code == 0
    assert "examples:\n  " in out
    assert "--json" in out


# As a process


def kbit_process(*argv, **env):
    return subprocess.run(
        [sys.executable, "-m", "kbit", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | env,
    )


def test_as_a_process():
    done = kbit_process("--version")
    assert (done.returncode, done.stdout) == (0, f"kbit {kbit.__version__}\n")
    failed = kbit_process("generate", "/no/such/model", "x", KBIT_LOG="debug")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr


def test_an_instruction_set_that_there_is_not_is_a_sentence():
    failed = kbit_process("generate", "x", KBIT_ISA="abacus")
    assert failed.returncode == 1
    assert "abacus" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_leaves_early():
    done = subprocess.run(
        f"{sys.executable} -m kbit generate 'Once' -n 200 --ignore-eos 2>&1 >/dev/full | cat; "
        f"{sys.executable} -m kbit generate 'Once' -n 200 --ignore-eos | head -c 4",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.endswith("Once")
    assert "Traceback" not in done.stderr + done.stdout

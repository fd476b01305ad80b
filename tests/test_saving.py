"""Saving under fire: killed at any moment, by several processes at once, on a full disk."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import kbit
import saving
import tiny
from kbit import _core
from kbit.converting import convert

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills with signals")
KILLS = 30


@contextmanager
def files_of_at_most(size):
    """Writing fails in the middle of a file, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def start(target):
    script = Path(__file__).with_name("saving.py")
    child = subprocess.Popen([sys.executable, script, target], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def kill(child):
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


def check(target, models):
    spec, weights, metadata = _core.open_checkpoint(target)
    assert metadata == {}
    assert weights.keys() == {"w"}
    assert weights["w"].raw().tobytes() == models[json.loads(spec)["model"]]


@pytest.mark.timeout(300)
def test_killed_at_any_moment(tmp_path, record_line):
    target = tmp_path / "model.safetensors"
    models = [saving.model(which)["w"].raw().tobytes() for which in (0, 1)]
    rng = random.Random(1)
    found = left = 0
    for _ in range(KILLS):
        child = start(target)
        time.sleep(rng.uniform(0, 0.05))
        kill(child)
        # The next writer sweeps what this one left.
        left += len(list(tmp_path.glob(".*.tmp")))
        if target.exists():
            check(target, models)
            found += 1
    _core.save_checkpoint(target, '{"model": 0}', saving.model(0), {})
    check(target, models)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    record_line(
        f"saving: {KILLS} kills, {found} times a whole file, {left} temporary files left and swept"
    )
    assert found >= KILLS // 2


def test_two_at_once(tmp_path):
    target = tmp_path / "model.safetensors"
    models = [saving.model(which)["w"].raw().tobytes() for which in (0, 1)]
    children = [start(target) for _ in range(2)]
    try:
        until = time.monotonic() + 3
        checks = 0
        while time.monotonic() < until:
            if target.exists():
                check(target, models)
                checks += 1
        assert checks
        assert all(child.poll() is None for child in children)
    finally:
        for child in children:
            kill(child)


def test_a_write_that_fails_is_an_error(tmp_path):
    target = tmp_path / "model.safetensors"
    weights = saving.model(0)
    _core.save_checkpoint(target, '{"model": 0}', weights, {})
    before = target.read_bytes()
    for size in (0, 1, 4096, 100_000, 500_000):
        with files_of_at_most(size), pytest.raises(OSError, match="File too large"):
            _core.save_checkpoint(target, '{"model": 1}', saving.model(1), {})
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def tree(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make_gguf(tmp_path_factory.mktemp("saving") / "source.gguf")


# Too small for config.json, for the tokenizer, and for the weights.
SIZES = (0, 1_000, 20_000)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gguf", [False, True], ids=["directory", "gguf"])
def test_a_full_disk_leaves_no_half_of_a_model(tmp_path, source, gguf, size):
    fresh, old, whole = (tmp_path / f"{name}{'.gguf' * gguf}" for name in ("fresh", "old", "whole"))
    with kbit.load(source) as first, kbit.load(source, bits=4) as second:
        write = convert if gguf else kbit.Model.save
        write(first, old)
        before = tree(tmp_path)
        for target in (fresh, old):
            with files_of_at_most(size), pytest.raises(OSError, match="File too large"):
                write(second, target)
            assert tree(tmp_path) == before
        assert not fresh.exists()
        write(second, whole)  # and succeeds where there is room
        write(second, old)
        assert all(p.stat().st_size for p in (whole, old))
        if not gguf:
            assert tree(old) == tree(whole)


@pytest.mark.parametrize("command", ["quantize", "convert"])
@pytest.mark.parametrize("size", SIZES)
def test_commands_fail_and_leave_nothing_on_a_full_disk(tmp_path, source, command, size):
    resource = pytest.importorskip("resource")
    target = tmp_path / ("out.gguf" if command == "convert" else "out")
    done = subprocess.run(
        [sys.executable, "-m", "kbit", command, source, target, "--bits", "4"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kbit: error: ")
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []

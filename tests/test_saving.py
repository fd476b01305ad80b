"""Saving under fire: killed at any moment, by several processes at once, on a full disk."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import saving
from kbit import _core

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills with signals")
KILLS = 30


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
    resource = pytest.importorskip("resource")
    target = tmp_path / "model.safetensors"
    weights = saving.model(0)
    _core.save_checkpoint(target, '{"model": 0}', weights, {})
    before = target.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file of at most 100 kB: writing fails in the middle, as on a full disk.
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (0, 1, 4096, 100_000, 500_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                _core.save_checkpoint(target, '{"model": 1}', saving.model(1), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]

"""What all tests share: hypothesis profiles, the inputs beside the repository, loaded models."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import kbit

REPO = Path(__file__).parent.parent
SHARED = Path(os.environ.get("KBIT_SHARED", REPO.parent / "shared"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs so; the processes of the Ctrl-C tests would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore_glob = ["golden/*"]  # makes the goldens, with torch

settings.register_profile("dev", max_examples=30, deadline=None)
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(scope="session")
def shared():
    """Path of an input under ../shared; the test is skipped, and counted, where it is absent."""

    def find(relative):
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"needs ../shared/{relative}")
        return path

    return find


@pytest.fixture(scope="session")
def stories():
    """The bundled model, 4 bits."""
    with kbit.load() as model:
        yield model


@pytest.fixture(scope="session")
def stories_f32(shared):
    """The model that the bundled one was made from, unquantised."""
    with kbit.load(shared("models/kbit-stories"), dtype="f32") as model:
        yield model


LINES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def record_line(request):
    """Records a line for the end of the report: a measured figure, a count."""
    return request.config.stash.setdefault(LINES, []).append


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(LINES, []):
        terminalreporter.line(line)

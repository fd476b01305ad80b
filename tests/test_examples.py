"""Everything shown to a reader runs: the programs in examples/ and the Python of the documentation."""

import os
import re
import subprocess
import sys

import pytest

from conftest import REPO

EXAMPLES = sorted((REPO / "examples").glob("*.py"))
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    """Python blocks of the documentation; one that begins with `# not run` says why in that line."""
    for page in PAGES:
        for i, code in enumerate(BLOCK.findall(page.read_text())):
            if not code.startswith("# not run"):
                yield pytest.param(code, id=f"{page.name}-{i}")


def run(*command, cwd):
    env = os.environ | {"PYTHONWARNINGS": "error"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path):
    assert run(sys.executable, path, cwd=tmp_path)


@pytest.mark.parametrize("code", list(blocks()))
def test_documentation(code, tmp_path):
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_there_is_something_to_run():
    assert len(EXAMPLES) >= 4
    assert PAGES[0].exists()

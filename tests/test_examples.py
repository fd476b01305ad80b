"""Everything shown to a reader runs: the programs in examples/ and the Python of the documentation."""

import os
import re
import subprocess
import sys

import pytest

from conftest import REPO
from kbit import loading

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


def test_the_rust_application_says_what_python_says(stories):
    """Built by `make rust`; it holds neither Python nor a graphics driver."""
    binary = REPO / "target" / "quick" / "kbit-embed"
    if not binary.exists():
        pytest.skip("needs target/quick/kbit-embed, which `make rust` builds")
    ids = [str(i) for i in stories.tokenize("Once upon a time")]
    said = run(binary, loading.BUNDLED, "24", *ids, cwd=REPO).split()
    expected = stories.generate("Once upon a time", max_new_tokens=24, ignore_eos=True).token_ids
    assert [int(i) for i in said] == expected
    tree = run("cargo", "tree", "--offline", "--edges", "normal", "-p", "kbit-embed", cwd=REPO)
    assert "kbit-cpu" in tree
    assert not re.search(r"pyo3|wgpu", tree)


def test_there_is_something_to_run():
    assert len(EXAMPLES) >= 4
    assert PAGES[0].exists()

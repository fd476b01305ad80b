"""Loading from the hub, against a small hub that these tests serve on loopback."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kbit import hub

SHA = "0123456789abcdef0123456789abcdef01234567"
OLD = "f" * 40
BIG = bytes(range(256)) * (12 << 12)  # more than the 10 MiB that huggingface_hub takes at a time
MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "tokenizer_config.json": b"{}",
    "model.safetensors": BIG,
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"\x80\x04.",
    "modeling.py": b"raise SystemExit",
    "original/model.safetensors": b"no",
    "README.md": b"#",
}
REPOS = {
    "me/whole": {SHA: MODEL, OLD: {**MODEL, "config.json": b'{"old": true}'}},
    "me/sharded": {
        SHA: {
            "config.json": b"{}",
            "model.safetensors.index.json": b'{"weight_map": {}}',
            "model-00001-of-00002.safetensors": b"one",
            "model-00002-of-00002.safetensors": b"two",
            "consolidated.00.pth": b"x",
        }
    },
    "me/quantised": {
        SHA: {
            "config.json": b"{}",
            "gptq_model-4bit.safetensors": b"q",
            "consolidated.safetensors": b"again",
            "adapter_model.safetensors": b"part",
        }
    },
    "me/pickled": {SHA: {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."}},
    "me/gguf": {
        SHA: {
            "a.Q4_K_M.gguf": b"GGUF",
            "parts/b-00001-of-00002.gguf": b"GGUF1",
            "parts/b-00002-of-00002.gguf": b"GGUF2",
        }
    },
    "me/nothing": {SHA: {"README.md": b"#"}},
}


class Hub(ThreadingHTTPServer):
    """A hub: the pages that huggingface_hub asks for. Large files are redirected to `elsewhere`."""

    daemon_threads = True

    def __init__(self, elsewhere: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.elsewhere = elsewhere
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.stalls = 0
        self.done = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error):
        self.done.set()
        self.shutdown()
        self.server_close()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def paths(self, method: str = "GET") -> list[str]:
        return [path for verb, path, _ in self.requests if verb == method]


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.command, path, headers))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "blob":
            self.file(BIG, {}, body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self.refuse(404, "EntryNotFound")

    def commit(self, repo, revision):
        commits = REPOS[repo]
        name = SHA if revision in ("main", SHA) else revision
        return (name, commits[name]) if name in commits else (None, None)

    def api(self, repo, rest):
        if repo == "me/gated":
            return self.refuse(403, "GatedRepo")
        if repo == "me/broken":
            return self.refuse(503, None)
        if repo not in REPOS:
            return self.refuse(401, "RepoNotFound")
        sha, files = self.commit(repo, rest[1] if len(rest) > 1 else "main")
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        if rest and rest[0] == "tree":
            value = [
                {"type": "file", "path": name, "size": len(data), "oid": self.etag(data)}
                for name, data in files.items()
            ]
        else:
            value = {
                "id": repo,
                "sha": sha,
                "private": False,
                "siblings": [{"rfilename": name} for name in files],
            }
        return self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def etag(self, data):
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def resolve(self, repo, revision, name, body):
        if repo not in REPOS:
            return self.refuse(401, "RepoNotFound")
        sha, files = self.commit(repo, revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        if name not in files:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{self.etag(files[name])}"'}
        if self.server.elsewhere and files[name] is BIG:
            digest = hashlib.sha256(BIG).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(BIG))}
            return self.send(
                302, b"", headers | {"Location": f"{self.server.elsewhere}/blob/{name}"}
            )
        return self.file(files[name], headers, body)

    def file(self, data, headers, body):
        start = 0
        status = 200
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            status = 206
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        rest = data[start:]
        if body and self.server.stalls and len(rest) > 1000:
            self.server.stalls -= 1
            self.send(status, rest, headers, cut=len(rest) * 11 // 12)
            self.close_connection = True
            return
        self.send(status, rest, headers, empty=not body)

    def refuse(self, status, code, headers=None):
        extra = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self.send(status, b"{}", extra | (headers or {}))

    def send(self, status, data, headers, *, cut=None, empty=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not empty and self.command == "GET":
            self.wfile.write(data[:cut])
            self.wfile.flush()
            if cut is not None:
                self.server.done.wait(10)


@pytest.fixture(scope="module")
def served():
    with Hub() as server:
        yield server


FETCH = """
import json, sys
from kbit import hub
name, options = json.loads(sys.argv[1])
fetch = hub.fetch_file if hub.is_file_id(name) else hub.fetch
try:
    print(json.dumps(["path", str(fetch(name, **options))]))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def fetch(server, cache, name, *, environment=None, revision=None, offline=False):
    """("path", directory) or (class of the error, its sentence), from a process of its own."""
    options = {"revision": revision, "cache_dir": str(cache), "local_files_only": offline}
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.port}" if server else "http://127.0.0.1:9",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        **(environment or {}),
    }
    child = subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps([name, options])],
        env=env, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    return tuple(json.loads(child.stdout.splitlines()[-1]))


def names(directory):
    root = Path(directory)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_only_what_is_needed_comes(served, tmp_path):
    kind, path = fetch(served, tmp_path, "me/whole")
    assert kind == "path", path
    assert names(path) == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    }
    assert (Path(path) / "model.safetensors").read_bytes() == BIG
    assert not [p for p in served.paths() if p.endswith((".bin", ".py", ".md")) or "original" in p]
    assert fetch(None, tmp_path, "me/whole", offline=True) == (kind, path)
    assert fetch(None, tmp_path, "me/whole", environment={"HF_HUB_OFFLINE": "1"}) == (kind, path)
    assert fetch(None, tmp_path, "me/whole") == (kind, path), "no network: the cache has it"


def test_shards(served, tmp_path):
    kind, path = fetch(served, tmp_path, "me/sharded")
    assert kind == "path", path
    assert names(path) == {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_weights_of_another_name(served, tmp_path):
    kind, path = fetch(served, tmp_path, "me/quantised")
    assert kind == "path", path
    assert names(path) == {"config.json", "gptq_model-4bit.safetensors"}


def test_revisions(served, tmp_path):
    kind, path = fetch(served, tmp_path, "me/whole", revision=OLD)
    assert kind == "path", path
    assert (Path(path) / "config.json").read_bytes() == b'{"old": true}'
    error, says = fetch(served, tmp_path, "me/whole", revision="v9")
    assert error == "FileNotFoundError"
    assert "no revision 'v9'" in says


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("me/missing", "FileNotFoundError", "no such model"),
        ("me/gated", "PermissionError", "HF_TOKEN"),
        ("me/broken", "FileNotFoundError", "not in the local cache"),
        ("me/pickled", "UnsupportedModelError", "save_pretrained"),
        ("me/gguf", "UnsupportedModelError", "'me/gguf/a.Q4_K_M.gguf'"),
        ("me/nothing", "UnsupportedModelError", "no weights"),
        ("me/gguf/b.gguf", "FileNotFoundError", "no such file"),
        ("me/missing/b.gguf", "FileNotFoundError", "no such model"),
    ],
)
def test_errors_say_what_to_do(served, tmp_path, name, error, says):
    got, sentence = fetch(served, tmp_path, name)
    assert (got, says in sentence) == (error, True), sentence
    assert name.rsplit("/b.", 1)[0] in sentence


def test_pickled_weights_are_not_even_fetched(served, tmp_path):
    fetch(served, tmp_path, "me/pickled")
    assert not [path for path in served.paths() if path.endswith(".bin")]


def test_a_file_and_its_other_parts(served, tmp_path):
    kind, path = fetch(served, tmp_path, "me/gguf/a.Q4_K_M.gguf")
    assert (kind, Path(path).read_bytes()) == ("path", b"GGUF")
    kind, path = fetch(served, tmp_path, "me/gguf/parts/b-00002-of-00002.gguf")
    assert (kind, Path(path).read_bytes()) == ("path", b"GGUF2")
    assert Path(path).with_name("b-00001-of-00002.gguf").read_bytes() == b"GGUF1"
    assert fetch(None, tmp_path, "me/gguf/a.Q4_K_M.gguf", offline=True)[0] == "path"


def test_nothing_in_the_cache(tmp_path):
    for options in ({"offline": True}, {"environment": {"HF_HUB_OFFLINE": "1"}}, {}):
        error, says = fetch(None, tmp_path, "me/whole", **options)
        assert error == "FileNotFoundError"
        assert "me/whole: not in the local cache" in says


def test_a_download_that_stalls_goes_on_where_it_stopped(tmp_path):
    with Hub() as server:
        server.stalls = 1
        environment = {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        kind, path = fetch(server, tmp_path, "me/whole", environment=environment)
        ranges = [headers.get("range") for _, _, headers in server.requests]
    assert kind == "path", path
    assert (Path(path) / "model.safetensors").read_bytes() == BIG
    starts = [int(each.removeprefix("bytes=").split("-")[0]) for each in ranges if each]
    assert any(0 < start < len(BIG) for start in starts)


def test_half_a_file_is_no_file(tmp_path):
    """A connection that breaks for good leaves nothing that a later call would take for the whole."""
    with Hub() as server:
        server.stalls = 100
        server.done.set()  # stalls end at once: the connection closes
        kind, says = fetch(server, tmp_path, "me/whole")
        assert kind != "path", says
        assert issubclass(getattr(builtins, kind), OSError)
        assert fetch(server, tmp_path, "me/whole", offline=True)[0] == "FileNotFoundError"
        server.stalls = 0
        kind, path = fetch(server, tmp_path, "me/whole")
    assert kind == "path", path
    assert (Path(path) / "model.safetensors").read_bytes() == BIG


def test_a_redirect_does_not_carry_the_token(tmp_path):
    # `localhost` is another host than 127.0.0.1.
    with Hub() as elsewhere, Hub(f"http://localhost:{elsewhere.port}") as server:
        kind, path = fetch(server, tmp_path, "me/whole", environment={"HF_TOKEN": "hf_secret"})
    assert kind == "path", path
    assert (Path(path) / "model.safetensors").read_bytes() == BIG
    sent = [headers.get("authorization") for _, _, headers in server.requests]
    assert "Bearer hf_secret" in sent, "the token goes to the hub itself"
    assert elsewhere.paths(), "the redirect was followed"
    assert not [h for _, _, h in elsewhere.requests if "hf_secret" in json.dumps(h)]


@pytest.mark.parametrize(
    ("name", "model", "file"),
    [
        ("a/b", True, False),
        ("Qwen/Qwen3-0.6B", True, False),
        ("a/b/c.gguf", False, True),
        ("a/b/c/d.gguf", False, True),
        ("a", False, False),
        ("a/b/c.bin", False, False),
        ("a/b/../c.gguf", False, False),
        ("../b", False, False),
        ("a/../b.gguf", False, False),
        ("/a/b", False, False),
        ("a/b/", False, False),
        ("a/b\n", False, False),
        ("./models", False, False),
    ],
)
def test_what_an_id_looks_like(name, model, file):
    assert hub.is_id(name) == model
    assert hub.is_file_id(name) == file

"""Collect the licences of every crate that is linked into the wheel.

    python tools/licences.py            write THIRD-PARTY.txt
    python tools/licences.py --check    exit 1 when the file does not list exactly the crates of Cargo.lock's build

Identical texts are printed once. A crate without a licence file of its own is listed under the expression of its manifest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "THIRD-PARTY.txt"
NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE")
# The wheels' targets: what only other systems link is not in them.
TARGETS = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin", "x86_64-pc-windows-msvc")


def linked() -> dict[str, dict[str, str]]:
    """Crates the extension links, by "name version", with their manifests' facts."""
    wanted: dict[str, dict[str, str]] = {}
    for target in TARGETS:
        out = subprocess.run(
            ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        meta = json.loads(out)
        packages = {p["id"]: p for p in meta["packages"]}
        nodes = {n["id"]: n for n in meta["resolve"]["nodes"]}
        root = next(i for i, p in packages.items() if p["name"] == "kbit-python")
        todo, seen = [root], {root}
        while todo:
            for dep in nodes[todo.pop()]["deps"]:
                if dep["pkg"] not in seen and any(k["kind"] is None for k in dep["dep_kinds"]):
                    seen.add(dep["pkg"])
                    todo.append(dep["pkg"])
        for i in seen:
            p = packages[i]
            if p["source"]:
                facts = {"license": p["license"] or "see its files", "at": str(Path(p["manifest_path"]).parent)}
                wanted[f"{p['name']} {p['version']}"] = facts
    return wanted


def main() -> int:
    """Write or check the file."""
    crates = linked()
    if sys.argv[1:] == ["--check"]:
        listing = OUT.read_text().split("=" * 100)[0]
        listed = {line[2:].split(" (")[0] for line in listing.splitlines() if line.startswith("* ")}
        missing, extra = sorted(set(crates) - listed), sorted(listed - set(crates))
        for name in missing:
            print(f"THIRD-PARTY.txt lacks {name}")
        for name in extra:
            print(f"THIRD-PARTY.txt lists {name}, which is not linked")
        return 1 if missing or extra else 0
    texts: dict[str, list[str]] = defaultdict(list)
    lines = ["kbit links the crates below; their licences follow.", ""]
    for name, facts in sorted(crates.items()):
        lines.append(f"* {name} ({facts['license']})")
        for file in sorted(Path(facts["at"]).iterdir()):
            if file.is_file() and file.name.upper().startswith(NAMES):
                texts[file.read_text(errors="replace").strip()].append(f"{name}: {file.name}")
    for text, users in sorted(texts.items(), key=lambda t: t[1]):
        lines += ["", "=" * 100, *users, "-" * 100, text]
    OUT.write_text("\n".join(lines) + "\n")
    print(f"{OUT.name}: {len(crates)} crates, {len(texts)} texts, {OUT.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

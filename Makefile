# make run    build, install into .venv, and let the bundled model tell a story
# make test   everything that is checked, with what it needs
# make help   this list

PYTHON ?= python3
BIN := .venv/bin
# Debug assertions and overflow checks in `cargo test`; what Python loads is optimised.
MATURIN := $(BIN)/maturin develop --quiet --profile quick
SOURCES := python tests examples

.DEFAULT_GOAL := help
.PHONY: help run test fmt lint rust docs python scalar build bundle clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: build ## build, install into .venv, stream a story with the bundled model
	$(BIN)/kbit generate "Once upon a time" --max-new-tokens 200 --temperature 0.7 --seed 4

test: fmt lint rust python scalar ## all checks: formats, lints, Rust and Python tests, once more without SIMD

fmt: .rust .venv/.test
	cargo fmt --all --check
	$(BIN)/ruff format --check $(SOURCES)

lint: build .venv/.test
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright
	$(BIN)/python -m mypy.stubtest kbit._core

rust: .rust
	cargo test --workspace --quiet
	cargo build --quiet --profile quick -p kbit-embed
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet

python: build .venv/.test
	$(BIN)/python -m pytest

scalar: build .venv/.test
	KBIT_ISA=scalar $(BIN)/python -m pytest -m core

build: .rust .venv/.build ## compile the extension and install the package into .venv
	$(MATURIN)

bundle: build ## quantise the bundled model again from ../shared/models/kbit-stories
	$(BIN)/kbit quantize $${KBIT_SHARED:-../shared}/models/kbit-stories python/kbit/models/stories --bits 4

clean: ## remove what was built
	rm -rf target .venv dist .hypothesis .pytest_cache .ruff_cache .mypy_cache

.PHONY: .rust
.rust:
	@command -v cargo >/dev/null || { echo "kbit is written in Rust, which is missing here. Install it with rustup"; \
	  echo "(see https://rustup.rs), open a new shell, and run make again."; exit 1; }

.venv/.build:
	$(PYTHON) -m venv .venv || { echo "No venv could be made: on Debian, apt install python3-venv."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip==26.3' 'maturin==1.16.0'
	touch $@

.venv/.test: .venv/.build pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group test --group lint
	touch $@

# Two commands for everyone: `make serve` and `make test`. The rest are their parts.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test check unit conformance torch engine bench-gateway docs clean

serve: .venv/core
	$(BIN)/gateway engines install vllm
	$(BIN)/gateway models pull demo
	$(BIN)/gateway serve --model demo

test: check unit conformance torch engine

# Lint, types and import contracts.
check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything that needs no engine: pure parts, faults, architecture.
unit: .venv/dev
	$(BIN)/python -m pytest -n 3 --dist loadfile tests/unit tests/faults tests/architecture

# The official client, this major and the one before, over all three emulated engines.
conformance: .venv/dev .venv-openai2/done
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/conformance
	.venv-openai2/bin/python -m pytest -n 2 --dist loadfile tests/conformance

# The trainer and the quantizer, on tiny models; peft and compressed-tensors are the judges.
torch: .venv-torch/done
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-torch/bin/python -m pytest -n 2 --dist loadfile tests/trainer tests/quant -m "not engine"

# The real vLLM and SGLang on the CPU, with the demo model and adapters compared to peft's own output.
engine: .venv/dev .venv-torch/done
	$(BIN)/gateway engines install vllm --device cpu
	$(BIN)/gateway engines install sglang --device cpu
	$(BIN)/gateway models pull demo
	$(BIN)/python -m pytest tests/engine

# The relay beside nginx, vllm-router, sglang-router, smg and LiteLLM, which it installs in a cache folder: ten minutes.
bench-gateway: .venv/dev
	$(BIN)/python -m tests.proofs.rivals --out docs/results

# Pages generated from the code; a test fails when they are stale.
docs: .venv/dev
	$(BIN)/python -m gateway.cli.docs

.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	touch $@

.venv/dev: .venv/core
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev,hub]'
	touch $@

.venv-openai2/done: pyproject.toml tests/conformance/requirements-openai2.txt
	$(PYTHON) -m venv .venv-openai2
	.venv-openai2/bin/python -m pip install --disable-pip-version-check -q -e . -r tests/conformance/requirements-openai2.txt
	touch $@

.venv-torch/done: pyproject.toml tests/requirements-torch.txt
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --disable-pip-version-check -q -e . -r tests/requirements-torch.txt
	touch $@

clean:
	rm -rf .venv .venv-openai2 .venv-torch build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

"""One gateway a session and engine; the engine's script is put back after each test."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.conformance.target import CONTEXT_TOKENS, TOOL_PARSERS, Target, running_target, serving

RUNNING = running_target()
ENGINES = (RUNNING.engine,) if RUNNING else ("vllm", "sglang", "lmdeploy")


@pytest.fixture(scope="session", params=ENGINES)
def served(request: pytest.FixtureRequest) -> Iterator[Target]:
    engine = request.param
    if RUNNING:
        yield RUNNING
        return
    flags = ("--max-model-len", str(CONTEXT_TOKENS), "--tool-call-parser", TOOL_PARSERS[engine])
    with serving(engine, *flags) as target:
        yield target


@pytest.fixture
def target(served: Target) -> Iterator[Target]:
    """A served model whose engine behaves until the test says otherwise."""
    served.script()
    yield served
    served.script()


@pytest.fixture
def client(target: Target) -> Iterator[openai.OpenAI]:
    with target.client() as client:
        yield client


def pytest_report_header() -> str:
    return f"openai client {openai.__version__}"

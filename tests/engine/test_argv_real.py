"""Our command lines, read by each engine's own argument parser in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uv

from backends import envs, registry
from backends import uv as project_uv
from backends.base import Endpoint
from backends.spec import BackendName, EngineSpec

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
LMDEPLOY_CLI = ROOT / ".venv-lmdeploy-cli"
LMDEPLOY_CLI_PINS = Path(__file__).with_name("requirements-lmdeploy-cli.txt")
MODEL = Path("/models/demo")  # no parser looks
ENDPOINT = Endpoint("127.0.0.1", 21000, "-k3y")  # as a random key may begin

# Each reads command lines as JSON from standard input and prints what the parser made of each, or its refusal.
PROBE = """
import contextlib, io, json, sys
{prepare}
def parsed(argv):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return {{k: v for k, v in {parse}.items() if isinstance(v, (str, int, float, list, type(None)))}}
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
answers = [parsed(argv) for argv in json.load(sys.stdin)]
print("\\nANSWERS " + json.dumps(answers, default=str))
"""
PROBES = {
    "vllm": PROBE.format(
        prepare="""
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser(prog="vllm")
serve = ServeSubcommand()
serve.subparser_init(parser.add_subparsers(dest="subparser"))
def vllm_args(argv):
    args = parser.parse_args(argv)
    serve.validate(args)
    return vars(args)
""",
        parse="vllm_args(argv)",
    ),
    "sglang": PROBE.format(
        prepare="""
from sglang.srt.server_args import prepare_server_args
def sglang_args(argv):
    args = prepare_server_args(argv)
    names = [name for name in dir(args) if not name.startswith("_")]
    return {name: getattr(args, name) for name in names}
""",
        parse="sglang_args(argv)",
    ),
    "lmdeploy": PROBE.format(
        prepare="""
from lmdeploy.cli.cli import CLI
from lmdeploy.cli.serve import SubCliServe
SubCliServe.add_parsers()
""",
        parse="vars(CLI.parser.parse_args(argv))",
    ),
}


@dataclass(frozen=True)
class Case:
    """A specification, and what the engine must understand of it."""

    changes: dict[str, Any]
    understood: dict[str, Any]


EVERYTHING = {
    "dtype": "float16",
    "tensor_parallel": 2,
    "max_model_len": 4096,
    "memory_fraction": 0.5,
    "quantization": "awq",
    "reasoning_parser": "qwen3",
}
CASES: dict[BackendName, list[Case]] = {
    "vllm": [
        Case(
            {"adapter_slots": 0},
            {
                "model_tag": str(MODEL),
                "host": "127.0.0.1",
                "port": 21000,
                "served_model_name": ["m"],
                "dtype": "auto",
                "api_key": None,
                "disable_uvicorn_access_log": True,
                "enable_lora": None,
                "tensor_parallel_size": 1,
            },
        ),
        Case(
            EVERYTHING
            | {"pipeline_parallel": 2, "tool_parser": "hermes", "max_adapter_rank": 48, "engine_args": ("--seed", "3")},
            {
                "dtype": "float16",
                "tensor_parallel_size": 2,
                "pipeline_parallel_size": 2,
                "max_model_len": 4096,
                "gpu_memory_utilization": 0.5,
                "quantization": "awq",
                "enable_lora": True,
                "max_loras": 4,
                "max_cpu_loras": 16,
                "max_lora_rank": 64,
                "enable_auto_tool_choice": True,
                "tool_call_parser": "hermes",
                "reasoning_parser": "qwen3",
                "seed": 3,
            },
        ),
        Case(
            {"device": "cpu", "task": "embed"},
            {
                "enforce_eager": True,
                "kv_cache_memory_bytes": 2 << 30,
                "runner": "pooling",
                "convert": "embed",
            },
        ),
    ],
    "sglang": [
        Case(
            {"device": "cpu"},
            {
                "model_path": str(MODEL),
                "host": "127.0.0.1",
                "port": 21000,
                "served_model_name": "m",
                "api_key": "-k3y",
                "enable_metrics": True,
                "log_level_http": "warning",
                "device": "cpu",
                "attention_backend": "torch_native",
                "sampling_backend": "pytorch",
                "max_total_tokens": 16384,
                "enable_lora": True,
                "max_loras_per_batch": 5,
                "max_loaded_loras": 16,
                "max_lora_rank": 64,
                "lora_target_modules": ["all"],
                "lora_backend": "torch_native",
                "is_embedding": False,
            },
        ),
        Case(
            EVERYTHING | {"pipeline_parallel": 2, "tool_parser": "qwen25", "adapter_slots": 0},
            {
                "dtype": "float16",
                "tp_size": 2,
                "pp_size": 2,
                "context_length": 4096,
                "mem_fraction_static": 0.5,
                "quantization": "awq",
                "enable_lora": None,
                "tool_call_parser": "qwen25",
                "reasoning_parser": "qwen3",
            },
        ),
        Case({"device": "cpu", "task": "embed"}, {"is_embedding": True}),
    ],
    "lmdeploy": [
        Case(
            {},
            {
                "model_path": str(MODEL),
                "server_name": "127.0.0.1",
                "server_port": 21000,
                "model_name": "m",
                "api_keys": ["-k3y"],
                "backend": "turbomind",
                "enable_prefix_caching": True,
                "adapters": None,
                "device": "cuda",
            },
        ),
        Case(
            EVERYTHING | {"tool_parser": "qwen3", "engine_args": ("--max-batch-size", "8")},
            {
                "dtype": "float16",
                "tp": 2,
                "session_len": 4096,
                "cache_max_entry_count": 0.5,
                "model_format": "awq",
                "tool_call_parser": "qwen3",
                "reasoning_parser": "qwen3",
                "max_batch_size": 8,
            },
        ),
    ],
}


@dataclass(frozen=True)
class Answers:
    """What one engine's parser made of all command lines; a refusal is its last line."""

    cases: list[Any]
    choices: dict[str, Any]
    unknown_flag: Any


@pytest.fixture(scope="module")
def answers(engine: BackendName) -> Answers:
    """One run of the engine's parser, which takes its imports' 10 s."""
    capabilities = registry.get(engine).capabilities
    choices: list[dict[str, Any]] = [{"quantization": name} for name in capabilities.quantizations]
    choices += [{"max_adapter_rank": rank} for rank in capabilities.adapter_ranks or (1, 48, 512)]
    changes = [*(case.changes for case in CASES[engine]), *choices, {"engine_args": ("--no-such-flag",)}]
    parsed = _parse(engine, [command_line(specification(engine, changed)) for changed in changes])
    cases, rest = parsed[: len(CASES[engine])], parsed[len(CASES[engine]) :]
    return Answers(cases, dict(zip(map(str, choices), rest, strict=False)), rest[-1])


def _parse(engine: BackendName, command_lines: list[tuple[str, ...]]) -> list[Any]:
    # LMDeploy's environment needs a GPU; its parser only needs torch and transformers, which SGLang's has.
    host = envs.find("vllm" if engine == "vllm" else "sglang", device="cpu")
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "SGLANG_USE_CPU_ENGINE": "1"}
    if engine == "lmdeploy":
        environment["PYTHONPATH"] = str(_lmdeploy_cli(host))
    done = subprocess.run(
        [host.python, "-c", PROBES[engine]],
        input=json.dumps(command_lines),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.rpartition("ANSWERS ")[2]))


def _lmdeploy_cli(host: envs.EngineEnv) -> Path:
    """LMDeploy and what its parser imports beside torch, installed once."""
    marker = LMDEPLOY_CLI / "installed.txt"
    pins = LMDEPLOY_CLI_PINS.read_text()
    if not marker.exists() or marker.read_text() != pins:
        command = [uv.find_uv_bin(), "pip", "install", "--quiet", "--no-deps", "--python", str(host.python)]
        command += ["--target", str(LMDEPLOY_CLI), "--requirements", str(LMDEPLOY_CLI_PINS)]
        subprocess.run(command, check=True, timeout=600, env=project_uv.environment(os.environ))
        marker.write_text(pins)
    return LMDEPLOY_CLI


def specification(engine: BackendName, changes: dict[str, Any]) -> EngineSpec:
    fields = {"version": "1", "model_path": MODEL, "served_name": "m", "device": "cuda"}
    return EngineSpec(backend=engine, **(fields | changes))


def command_line(spec: EngineSpec) -> tuple[str, ...]:
    return registry.get(spec.backend).launch(spec, ("engine",), ENDPOINT, {}).argv[1:]


@pytest.mark.parametrize("engine", CASES, scope="module")
def test_each_engine_understands_its_command_line(engine: BackendName, answers: Answers) -> None:
    for case, answer in zip(CASES[engine], answers.cases, strict=True):
        assert isinstance(answer, dict), answer
        assert {name: answer[name] for name in case.understood} == case.understood


@pytest.mark.parametrize("engine", CASES, scope="module")
def test_each_engine_knows_the_choices_we_offer(engine: BackendName, answers: Answers) -> None:
    refused = {choice: answer for choice, answer in answers.choices.items() if not isinstance(answer, dict)}
    assert answers.choices
    assert refused == {}


@pytest.mark.parametrize("engine", CASES, scope="module")
def test_a_flag_that_the_engine_does_not_know_is_named(engine: BackendName, answers: Answers) -> None:
    assert "unrecognized arguments: --no-such-flag" in answers.unknown_flag
    assert "--no-such-flag" in str(registry.get(engine).start_failure(answers.unknown_flag))


def test_lmdeploy_lists_adapters_in_its_own_form() -> None:
    launch = registry.get("lmdeploy").launch(
        specification("lmdeploy", {}), ("engine",), ENDPOINT, {"a-1": Path("/x"), "a-2": Path("/y")}
    )
    position = launch.argv.index("--adapters")
    assert launch.argv[position + 1 : position + 3] == ("a-1=/x", "a-2=/y")

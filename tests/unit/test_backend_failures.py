"""The cause of a failed start, from what the engines really wrote and from lines of their sources."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from backends import failures, registry
from backends.spec import BACKEND_NAMES, BackendName

RECORDINGS = Path(failures.__file__).parent / "emulator" / "recordings"


def recorded_log(engine: str, name: str) -> str:
    recording = json.loads((RECORDINGS / engine / f"{name}.json").read_text())
    return "\n".join(recording.get("log_tail") or [*recording["first"], *recording["last"]])


@pytest.mark.parametrize(
    ("engine", "name", "cause"),
    [
        ("vllm", "start_no_model", "does not hold a checkpoint with a config.json; check --model"),
        ("vllm", "start_port_taken", "Another process took the engine's port"),
        ("vllm", "start_unknown_flag", "does not know the argument --no-such-flag"),
        ("vllm", "start_cuda_oom", "Only 3.12 of the GPU's 79.19 GiB are free"),
        ("sglang", "start_no_model", "does not hold a checkpoint with a config.json; check --model"),
        ("sglang", "start_port_taken", "Another process took the engine's port"),
        ("sglang", "start_unknown_flag", "does not know the argument --no-such-flag"),
        ("sglang", "start_cuda_oom", "The weights leave no memory for the KV cache; raise --memory-fraction"),
        ("lmdeploy", "start_cuda_oom", "The GPU ran out of memory"),
        ("lmdeploy", "start_no_model", "does not hold a checkpoint with a config.json; check --model"),
        ("lmdeploy", "start_port_taken", "Another process took the engine's port"),
        ("lmdeploy", "start_unknown_flag", "does not know the argument --no-such-flag"),
        ("lmdeploy", "start_adapter_missing", "The adapter directory {adapters}/nowhere is gone"),
        ("lmdeploy", "start_adapter_wrong_base", "its weights are 128 wide where this model has 576"),
    ],
)
def test_recorded_failures(engine: BackendName, name: str, cause: str) -> None:
    found = registry.get(engine).start_failure(recorded_log(engine, name))
    assert found is not None
    assert cause in found


@pytest.mark.parametrize(
    "path", sorted(RECORDINGS.glob("*/log_*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_good_start_shows_no_cause(path: Path) -> None:
    assert failures.find(recorded_log(path.parent.name, path.stem)) is None


LINES = [
    (
        "argument --max-lora-rank: invalid choice: 48 (choose from 1, 8, 16)",
        "limit of 48; set --max-adapter-rank to one of 1, 8, 16",
    ),
    (
        "launch_server.py: error: argument --tool-call-parser: invalid choice: 'x' (choose from a, b)",
        "no tool parser called x; choose one of a, b",
    ),
    ("KeyError: 'invalid tool call parser: x (chose from { a,b })'", "no tool parser called x; choose one of { a,b }"),
    (
        "KeyError: \"Reasoning parser 'x' not found. Available parsers: a, b\"",
        "no reasoning parser called x; choose one of a, b",
    ),
    ("KeyError: 'invalid reasoning parser: x (chose from { a,b })'", "no reasoning parser called x"),
    (
        "vllm serve: error: argument --dtype: invalid choice: 'int4' (choose from auto)",
        "refuses the argument --dtype: invalid choice: 'int4'",
    ),
    ("RuntimeError: No CUDA GPUs are available", "--device cpu"),
    ("AssertionError: Torch not compiled with CUDA enabled", "no CUDA device"),
    (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        "driver on your system is too old (found version 11040); update the driver",
    ),
    (
        "World size (4) is larger than the number of available GPUs (1) in this node.",
        "asks for 4 GPUs and this machine has 1",
    ),
    ("CUDA error: invalid device ordinal", "CUDA_VISIBLE_DEVICES"),
    ("CUDA error: no kernel image is available for execution on the device", "not built for this GPU"),
    ("OSError: [Errno 28] No space left on device", "full"),
    (
        "ValueError: To serve at least one request with the model's max seq len (8192), (0.18 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (0.1 GiB). Based on",
        "8192 tokens needs 0.18 GiB of KV cache and 0.1 GiB are left",
    ),
    ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "raise --memory-fraction"),
    ("RuntimeError: No enough gpu memory for kv cache.", "raise --memory-fraction"),
    (
        "ValueError: Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 71 GiB).",
        "Only 3.1 of the GPU's 79.2 GiB are free",
    ),
    (
        "ValueError: Available memory on node 0 (5.1/22.9 GiB) on startup is less than desired CPU memory utilization",
        "Only 5.1 of the machine's 22.9 GiB are free",
    ),
    (
        "RuntimeError: The memory capacity is unbalanced. Some GPUs may be occupied by other processes. "
        "pre_model_load_memory=101.13543701171875, local_gpu_memory=138.31268310546875, local_gpu_memory * 0.9=124.5\n"
        "[guard] 16:13:53 engine ended by SIGKILL, not sent by the gateway; ending",
        "One of the engine's GPUs has 101 GiB free where another has 138",
    ),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "GPU ran out of memory"),
    (
        "[guard] 12:00:00 engine ended by SIGKILL, not sent by the gateway; ending",
        "machine ran out of memory",
    ),
    (
        "RuntimeError: Engine core initialization failed. Failed core proc(s): {'EngineCore_DP0': -9}",
        "machine ran out of memory",
    ),
    ("Rank 0 scheduler died during initialization (exit code: -9). If exit", "machine ran out of memory"),
    (
        "Model architectures ['FooForCausalLM'] are not supported for now. Supported",
        "no implementation of 'FooForCausalLM'",
    ),
    (
        "The checkpoint you are trying to load has model type `foo` but Transformers does not recognize this "
        "architecture.",
        "does not know the model type foo",
    ),
    (
        "FooForCausalLM has no SGlang implementation and the Transformers implementation is not compatible",
        "SGLang has no implementation of FooForCausalLM",
    ),
    ("ValueError: BertModel does not support LoRA yet.", "--adapter-slots 0"),
    (
        "Total number of attention heads (9) must be divisible by tensor parallel size (2).",
        "9 attention heads cannot be shared out over --tp 2; choose a --tp that divides 9",
    ),
    ("    assert self.total_num_heads % tp_size == 0", "cannot be shared out over this --tp"),
    (
        "User-specified max_model_len (99999) is greater than the derived max_model_len (max_position_embeddings="
        "8192.0 or",
        "--max-model-len 99999 is more than the 8192 tokens",
    ),
    (
        "Warning: User-specified context_length (99999) is greater than the derived context_length (8192). This may",
        "--max-model-len 99999 is more than the 8192 tokens",
    ),
    (
        "Quantization method specified in the model config (gptq) does not match the quantization method specified in "
        "the `quantization` argument (awq).",
        "quantized as gptq and --quantization says awq",
    ),
    (
        "The quantization method fp8 is not supported for the current GPU. Minimum capability: 89. Current "
        "capability: 80.",
        "too old for fp8 quantization, which needs compute capability 89",
    ),
    (
        "torch.bfloat16 is not supported for quantization method awq. Supported dtypes: [torch.float16]",
        "awq checkpoints cannot be computed in bfloat16",
    ),
    ("OSError: /m does not appear to have a file named config.json.", "check --model"),
    ("ValueError: Unrecognized model in /m. Should have a `model_type` key in its config.json.", "check --model"),
    ("RuntimeError: Cannot find any model weights with `/m`", "no weights"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata", "damaged or cut short"),
    ("RuntimeError: Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist", "set CUDA_HOME"),
    ("RuntimeError: Ninja build failed. Ninja output:\nninja: build stopped: subcommand failed.", "nvcc is missing"),
    ("ModuleNotFoundError: No module named 'flashinfer'", "lacks the package flashinfer"),
    (
        "lmdeploy - ERROR - base.py:55 - <Dist> check failed!\nMulti-nodes support requires `ray`.",
        "lacks the package ray",
    ),
    ("ImportError: libcudart.so.13: cannot open shared object file", "environment is broken (libcudart.so.13"),
    ("set `trust_remote_code=True` in LLM", "--engine-arg=--trust-remote-code"),
]


@pytest.mark.parametrize(("line", "cause"), LINES)
def test_lines_of_the_engines_sources(line: str, cause: str) -> None:
    found = failures.find(f"INFO starting\nTraceback (most recent call last):\n{line}\n")
    assert found is not None
    assert cause in found


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_an_unknown_failure_is_not_explained_away(name: BackendName) -> None:
    assert registry.get(name).start_failure("Traceback (most recent call last):\nZeroDivisionError: division") is None


def test_the_root_cause_stands_above_what_it_drags_behind() -> None:
    log = "torch.OutOfMemoryError: CUDA out of memory.\nRuntimeError: Failed core proc(s): {'E': 1}\nImportError: x"
    assert "GPU ran out of memory" in str(failures.find(log))


def test_sglang_killing_itself_is_no_lack_of_memory() -> None:
    killed = "[guard] engine ended by SIGKILL, not sent by the gateway; ending"
    said = "Received sigquit from a child process. It usually means the child failed."
    assert failures.find(f"AssertionError: who knows\n{said}\n{killed}") is None
    assert "no weights" in str(
        failures.find(f"RuntimeError: Cannot find any model weights with `/m`\n{said}\n{killed}")
    )


def test_every_sentence_fills_its_groups() -> None:
    for cause in failures.CAUSES:
        groups = re.compile(cause.pattern).groups
        filled = cause.sentence.format(*(f"<{number}>" for number in range(groups)))
        assert all(f"<{number}>" in filled for number in range(groups)), cause.pattern
        assert cause.sentence.endswith((".", "{1}"))

"""The installed CPU environments: what lies in them, and that the shims do in the real engines what they promise."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from backends import envs
from backends.envs import CATALOGUE, EngineEnv
from backends.install import exclusive, import_failure
from backends.progress import Silent
from gateway import demo

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
CPU_ENVIRONMENTS = [env for env in CATALOGUE if env.device == "cpu"]


def run(env: EngineEnv, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code with the environment's Python."""
    environ = os.environ | variables
    return subprocess.run(
        [env.python, "-P", "-c", code], env=environ, capture_output=True, text=True, check=False, timeout=240
    )


def answer(env: EngineEnv, code: str, **variables: str) -> object:
    """The JSON in the last line that the code prints."""
    done = run(env, code, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


_DISTRIBUTIONS = """
import importlib.metadata, json
print(json.dumps({d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}))
"""
_SHIM_DISTRIBUTIONS = {"vllm", "tunegate-vllm-cpu", "tunegate-sglang-cpu"}


@pytest.mark.parametrize("env", CPU_ENVIRONMENTS, ids=str)
def test_environment_holds_its_lock_and_nothing_else(env: EngineEnv) -> None:
    envs.find(env.name, env.version, env.device)
    pins = (line.split("==") for line in env.lock.read_text().splitlines() if not line.startswith("#"))
    pinned = {name.lower().replace("_", "-"): version for name, version in pins}
    found = answer(env, _DISTRIBUTIONS)
    assert isinstance(found, dict)
    assert {name: version for name, version in found.items() if name not in _SHIM_DISTRIBUTIONS} == pinned


@pytest.mark.parametrize("env", CPU_ENVIRONMENTS, ids=str)
def test_import_check_passes_and_can_fail(env: EngineEnv) -> None:
    assert import_failure(env) == ""
    assert run(env, env.check, CUDA_VISIBLE_DEVICES="").returncode == 0
    assert run(env, "import torch; torch.version.cuda = '13.0'; " + env.check).returncode != 0


# One decode step of a batch of three rows through vLLM's own CPU operators: adapter in slot 0, none, adapter in slot 1.
# Then the logits of whole prompts, one of each request, in a batch of these three.
_MIXED_BATCH = """
import json, torch
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
torch.manual_seed(0)
rank, width, slots = 4, 8, 2
wrapper = PunicaWrapperCPU(16, 16, "cpu")
wrapper.is_prefill = False
rows = torch.tensor([0, -1, 1])
wrapper._token_lora_indices[:3] = rows
wrapper.indices_len[0] = 3
x = torch.randn(3, width)
a, b = torch.randn(slots, 1, rank, width), torch.randn(slots, 1, width, rank)
y = torch.zeros(3, width)
wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (width,))
want = torch.stack([b[0, 0] @ a[0, 0] @ x[0], torch.zeros(width), b[1, 0] @ a[1, 0] @ x[2]])
found = [bool(torch.allclose(y[i], want[i], atol=1e-4)) for i in range(3)]

tokens = torch.tensor([0] * 4 + [-1] * 3 + [1] * 4)
wrapper._token_lora_indices[:11] = tokens
wrapper._sampler_indices[:3] = rows
wrapper.indices_len[:2] = 11, 3
hidden = torch.randn(11, width)
try:
    for first, last in (0, 4), (4, 6), (7, 11):
        y = torch.zeros(last - first, width)
        wrapper.add_lora_logits(y, hidden[first:last], a, b, 1.0)
        slot = tokens[first]
        want = hidden[first:last] @ a[slot, 0].T @ b[slot, 0].T if slot >= 0 else torch.zeros_like(y)
        found.append(bool(torch.allclose(y, want, atol=1e-4)))
except RuntimeError:
    found.append("died")
print(json.dumps(found))
"""


def test_vllm_rows_get_their_own_adapter_or_none() -> None:
    env = envs.find("vllm", None, "cpu")
    assert answer(env, _MIXED_BATCH) == [True] * 6


def test_vllm_without_the_mend_answers_them_with_the_last_slot_and_dies_of_prompts() -> None:
    """Once this fails, vLLM has mended it and the shim, or a part of it, can go."""
    env = envs.find("vllm", None, "cpu")
    assert answer(env, _MIXED_BATCH, VLLM_PLUGINS="") == [True, False, True, "died"]


# The same seed for a prompt that vLLM reads at once and for one that it reads in four pieces. Weights are so small that
# every token is about as likely: what is drawn depends on the seed, and on nothing having been drawn for the pieces.
_SEEDED = """
import json, os, pathlib, tempfile
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "CRITICAL", "OMP_NUM_THREADS": "1"}
from vllm import LLM, SamplingParams
config = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}
with tempfile.TemporaryDirectory() as directory:
    (pathlib.Path(directory) / "config.json").write_text(json.dumps(config))
    engine = LLM(
        directory, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, max_model_len=256,
        max_num_batched_tokens=32, max_num_seqs=4, kv_cache_memory_bytes=1 << 24,
    )
    settings = SamplingParams(seed=7, max_tokens=8, ignore_eos=True, detokenize=False)
    try:
        drawn = [
            engine.generate({"prompt_token_ids": [5] * length}, settings, use_tqdm=False)[0].outputs[0].token_ids
            for length in (20, 100)
        ]
        print(json.dumps(drawn[0] == drawn[1]))
    except RuntimeError as error:
        print(json.dumps(str(error)))
"""


def test_vllm_keeps_a_seed_however_the_prompt_is_cut() -> None:
    env = envs.find("vllm", None, "cpu")
    assert answer(env, _SEEDED) is True


def test_vllm_without_the_mend_dies_of_a_seed() -> None:
    """Once this fails, vLLM has mended it and that part of the shim can go."""
    env = envs.find("vllm", None, "cpu")
    assert answer(env, _SEEDED, VLLM_PLUGINS="tunegate_cpu_lora") == "CPU Generator does not use offset"


def test_vllm_command_line_knows_its_version() -> None:
    env = envs.find("vllm", None, "cpu")
    done = subprocess.run([*envs.executable(env), "--version"], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.splitlines()[-1] == f"{env.version}+cpu"


_STAND_INS = """
import json, torch
import sgl_kernel, torchvision.transforms.functional
from sgl_kernel.elementwise import silu_and_mul
said = ""
try:
    silu_and_mul(torch.ones(1))
except RuntimeError as error:
    said = str(error)
from tunegate_sglang_cpu import drop_pinned_memory
drop_pinned_memory()
print(json.dumps([
    said,
    torchvision.transforms.InterpolationMode.BICUBIC,
    hasattr(sgl_kernel, "__wrapped__"),
    torch.ones(2, pin_memory=True).pin_memory().sum().item(),
]))
"""


def test_sglang_stand_ins_import_and_refuse_to_compute() -> None:
    told = answer(envs.find("sglang", None, "cpu"), _STAND_INS)
    assert isinstance(told, list)
    said, constant, wrapped, total = told
    assert said.startswith("sgl_kernel.elementwise.silu_and_mul is not there: this SGLang runs on a CPU")
    assert (constant, wrapped, total) == ("BICUBIC", False, 2.0)


def test_demo_model_is_the_same_whichever_engine_makes_it(demo_model: Path, tmp_path: Path) -> None:
    """The one at hand was made with vLLM's environment."""
    python = envs.find("sglang", None, "cpu").python
    with exclusive(tmp_path / ".lock", Silent()) as lock_fd:
        gguf = demo._fetch(tmp_path / "package", Silent(), lock_fd)
        demo._convert(python, gguf, tmp_path / "model", Silent(), lock_fd)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (demo_model / name).read_bytes()

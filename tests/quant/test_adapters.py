"""Golden prompts of adapters, run through a checkpoint with the adapter added: who survives a new base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from gateway.control import gate  # noqa: E402
from quant.adapters import MEAN_NATS, WORST_NATS, find_adapters, survivals  # noqa: E402
from quant.config import Grid, QuantOptions  # noqa: E402
from quant.errors import BadAdapter  # noqa: E402
from quant.walk import quantize_checkpoint  # noqa: E402

CPU = torch.device("cpu")
PROMPTS = ([5, 9, 40, 77, 12], [8, 8, 100, 3, 60, 61, 62])
CONFIG = {"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"1.self_attn.q_proj": 16}}


@pytest.fixture(scope="module")
def adapter(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An rsLoRA with a pattern of its own for one module, and goldens that transformers computed with it merged."""
    import transformers

    directory = tmp_path_factory.mktemp("adapters") / "mine"
    directory.mkdir()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_of("llama"), dtype=torch.float32)
    base_model = transformers.AutoModelForCausalLM.from_pretrained(model_of("llama"), dtype=torch.float32)
    generator, tensors = torch.Generator().manual_seed(3), {}
    for module, scale in (("model.layers.0.mlp.up_proj", 8 / 2), ("model.layers.1.self_attn.q_proj", 16 / 2)):
        weight = model.get_submodule(module).weight
        a_rK = torch.randn(4, weight.shape[1], generator=generator) * 0.05
        b_Nr = torch.randn(weight.shape[0], 4, generator=generator) * 0.05
        weight.data += scale * b_Nr @ a_rK
        tensors |= {f"base_model.model.{module}.lora_A.weight": a_rK, f"base_model.model.{module}.lora_B.weight": b_Nr}
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG))
    goldens = [golden(model, base_model, prompt) for prompt in PROMPTS]
    (directory / "manifest.json").write_text(json.dumps({"golden": goldens}))
    return directory


def golden(model: Any, base_model: Any, prompt: list[int]) -> dict[str, Any]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answer = torch.tensor(ids[len(prompt) :])

        def logprobs(side: Any) -> list[float]:
            logits_TV = side(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
            return list(logits_TV.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1).tolist())

        known = {"logprobs": logprobs(model), "base_logprobs": logprobs(base_model)}
    return {"prompt_token_ids": list(prompt), "token_ids": answer.tolist(), **known}


def test_over_its_own_base_an_adapter_is_what_it_was(adapter: Path, model_of: Callable[[str], Path]) -> None:
    """Scale, rsLoRA and patterns included: transformers with the update merged says the same."""
    (found,) = survivals(model_of("llama"), [adapter], CPU)
    assert found.survives and found.adapter == "mine"
    assert (found.prompts, found.tokens, found.same_choice) == (2, 12, 1.0)
    assert found.worst_nats < 1e-3
    assert found.gain_kept == pytest.approx(1, abs=1e-3)


def test_over_eight_bits_it_survives_and_over_another_model_it_does_not(
    adapter: Path, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    grid = Grid(bits=8, group_size=32, symmetric=True)
    options = QuantOptions(model=model_of("llama"), format="compressed-tensors", grid=grid, calib_samples=0)
    quantize_checkpoint(options, tmp_path / "q", lambda step: None)
    (found,) = survivals(tmp_path / "q", [adapter], CPU)
    assert found.survives
    assert 0 < found.mean_nats < 0.05
    (other,) = survivals(model_of("qwen3"), [adapter], CPU)
    assert not other.survives


def test_adapters_that_cannot_be_judged_are_named(
    adapter: Path, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert find_adapters([adapter.parent]) == find_adapters([adapter]) == [adapter]
    with pytest.raises(BadAdapter, match="is no adapter and holds none"):
        find_adapters([tmp_path])
    with pytest.raises(BadAdapter, match=r"changes model\.layers\.0\.mlp\.up_proj as .* does not have it"):
        survivals(model_of("qwen3_moe"), [adapter], CPU)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "manifest.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadAdapter, match="no golden prompts"):
        survivals(model_of("llama"), [tmp_path], CPU)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_ids": None}, "has no token_ids that this model's"),
        ({"token_ids": []}, "has no token_ids"),
        ({"token_ids": [3, 10**6]}, "has no token_ids"),
        ({"prompt_token_ids": "text"}, "has no prompt_token_ids"),
        ({"logprobs": [-1.0]}, "has no logprobs for each of its 6 token_ids"),
        ({"base_logprobs": ["-1"] * 6}, "has no base_logprobs for each"),
    ],
)
def test_a_golden_prompt_that_lacks_something_is_named(
    changes: dict[str, Any], said: str, adapter: Path, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "mine")
    goldens = json.loads((adapter / "manifest.json").read_text())["golden"]
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps({"golden": [goldens[0], goldens[1] | changes]}))
    with pytest.raises(BadAdapter, match=rf"golden prompt 2 in .*mine/manifest\.json {said}"):
        survivals(model_of("llama"), [tmp_path / "mine"], CPU)


def test_a_configuration_without_a_rank_is_named(
    adapter: Path, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "mine")
    (tmp_path / "mine" / "adapter_config.json").write_text('{"lora_alpha": 8}')
    with pytest.raises(BadAdapter, match="says no rank"):
        survivals(model_of("llama"), [tmp_path / "mine"], CPU)


def test_the_limits_are_those_of_the_gateways_own_check() -> None:
    assert gate.TOLERANCES["quantized"] == WORST_NATS
    assert gate.TOLERANCES["quantized"] * gate._MEAN_SHARE == MEAN_NATS

"""Our adapters against peft: the same file, the same logits, the same gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from tests.trainer.test_numerics import CPU, gradients, make_learner, random_sequences  # noqa: E402
from trainer.errors import CheckpointError, ModelError  # noqa: E402
from trainer.lora import LoraLinear  # noqa: E402
from trainer.objectives import Sft  # noqa: E402
from trainer.pack import pack_sequences  # noqa: E402
from trainer.peft_files import load_adapter, save_adapter  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "rank stabilised": {"rank_stabilised": True, "rank": 8},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 6}, "alpha_pattern": {"v_proj": 3.5}},
    "named": {"targets": ("q_proj", "v_proj")},
    "by expression": {"targets": (r".*layers\.1\.self_attn\.[qk]_proj",)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_peft_loads_it_with_equal_logits_and_gradients(checkpoint: Path, tmp_path: Path, settings: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    learner = make_learner(checkpoint, **settings)
    assert learner.adapter is not None
    save_adapter(learner.adapter, tmp_path, str(checkpoint))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    ids = random_sequences((30,))[0][0]
    token_ids = torch.from_numpy(ids).long()[None]
    loss = theirs(token_ids, labels=token_ids).loss
    loss.backward()
    ours = learner.forward_backward(pack_sequences([(ids, np.ones(30, np.float32))], CPU), Sft(), 29.0)["loss"]
    torch.testing.assert_close(ours, loss.detach(), rtol=1e-6, atol=1e-6)
    theirs_by_name = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    ours_by_name = gradients(learner)
    assert theirs_by_name.keys() == ours_by_name.keys()
    for name, gradient in ours_by_name.items():
        torch.testing.assert_close(gradient, theirs_by_name[name].grad, rtol=1e-4, atol=1e-6)


def test_a_saved_adapter_loads_back_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    first, second = make_learner(checkpoint), make_learner(checkpoint)
    assert first.adapter is not None and second.adapter is not None
    for _, parameter in first.adapter.parameters():
        torch.nn.init.normal_(parameter)
    save_adapter(first.adapter, tmp_path, "base")
    load_adapter(second.adapter, tmp_path)
    pairs = zip(first.adapter.parameters(), second.adapter.parameters(), strict=True)
    assert all(torch.equal(mine, other) for (_, mine), (_, other) in pairs)


def test_an_adapter_of_another_rank_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    small, large = make_learner(checkpoint), make_learner(checkpoint, rank=8)
    assert small.adapter is not None and large.adapter is not None
    save_adapter(small.adapter, tmp_path, "base")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(large.adapter, tmp_path)


def test_a_partly_written_adapter_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    learner = make_learner(checkpoint)
    assert learner.adapter is not None
    save_adapter(learner.adapter, tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read"):
        load_adapter(learner.adapter, tmp_path)


def test_disabled_the_model_is_its_base(checkpoint: Path) -> None:
    learner = make_learner(checkpoint)
    assert learner.adapter is not None
    batch = pack_sequences(random_sequences((20,)), CPU)
    with_adapter = learner.score(batch)
    base = learner.reference(batch)
    for _, parameter in learner.adapter.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(base, learner.score(batch))
    assert not torch.allclose(with_adapter, base, atol=1e-3)


def test_all_linear_leaves_the_vocabulary_matrix_alone(checkpoint: Path) -> None:
    learner = make_learner(checkpoint)
    assert learner.adapter is not None
    assert learner.adapter.target_names() == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert not isinstance(learner.base.model.get_output_embeddings(), LoraLinear)
    assert all(parameter.dtype == torch.float32 for parameter in learner.parameters.values())


def test_part_of_the_layers_is_written_by_full_name(checkpoint: Path, tmp_path: Path) -> None:
    learner = make_learner(checkpoint, targets=(r".*layers\.1\.self_attn\.q_proj",))
    assert learner.adapter is not None
    save_adapter(learner.adapter, tmp_path, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "model.layers.1.self_attn.q_proj"
    ]


@pytest.mark.parametrize(
    ("target", "message"), [("kv_proj", "the model has down_proj, gate_proj"), ("(", "no regular expression")]
)
def test_a_target_that_matches_nothing_is_refused(checkpoint: Path, target: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_learner(checkpoint, targets=(target,))


def test_dropout_changes_training_and_not_evaluation(checkpoint: Path) -> None:
    learner, batch = make_learner(checkpoint, dropout=0.5), pack_sequences(random_sequences((20,)), CPU)
    first, second = (learner.forward_backward(batch, Sft(), 1.0)["loss"] for _ in range(2))
    assert first != second
    assert learner.evaluate(batch, Sft())["loss"] == learner.evaluate(batch, Sft())["loss"]


def test_in_bfloat16_the_adapter_stays_float32(checkpoint: Path) -> None:
    learner = make_learner(checkpoint)
    exact = learner.forward_backward(pack_sequences(random_sequences((40,)), CPU), Sft(), 20.0)["loss"]
    learner.base.model.to(torch.bfloat16)
    for name, parameter in learner.parameters.items():
        parameter.data = parameter.data.float()
        assert parameter.dtype == torch.float32, name
    learner.optimizer.zero_grad()
    rough = learner.forward_backward(pack_sequences(random_sequences((40,)), CPU), Sft(), 20.0)["loss"]
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(parameter.grad.dtype == torch.float32 for parameter in learner.parameters.values())

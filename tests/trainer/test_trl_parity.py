"""Twenty steps of our trainer beside TRL's: same model, data, order and schedule, in float32.

Needs an environment with trl and peft: pip install -r tests/trainer/requirements-trl.txt
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl: see tests/trainer/requirements-trl.txt")

import datasets
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from tests.trainer.models import CHATML, chat_rows, labelled_rows, make_checkpoint, preference_rows, write_jsonl
from trainer import config, run
from trainer.events import curve
from trainer.learner import Learner
from trainer.lora import LoraSettings, inject
from trainer.model import load_base
from trainer.objectives import Grpo
from trainer.pack import pack_sequences
from trainer.peft_files import save_adapter
from trainer.rollout import Rollout, normaliser, rows

# Warnings of TRL and its dependencies are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, BATCH, MICRO = 20, 8, 4
# TRL also learns what a template writes behind the stop token; here it writes nothing.
TEMPLATE = CHATML.replace("<|im_end|>\n", "<|im_end|>")


def ours(method: str, settings: dict[str, Any]) -> list[float]:
    """Our losses, and the same starting adapter written for TRL."""
    resolved = config.load(method, None, settings)
    base = load_base(resolved)
    adapter = inject(
        base.model, LoraSettings(rank=resolved.lora_rank, alpha=resolved.alpha), torch.Generator().manual_seed(0)
    )
    first = resolved.output_dir.with_name("first")
    first.mkdir()
    save_adapter(adapter, first, settings["model"])
    run.start(resolved)
    return list(curve(resolved.output_dir / "events.jsonl").values())


def theirs(
    trainer_class: Any, config_class: Any, rows: list[dict[str, Any]], settings: dict[str, Any], micro: int, **more: Any
) -> list[float]:
    """TRL's loss of each optimizer step, unrounded."""
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, settings["output_dir"].with_name("first"), is_trainable=True)
    arguments = config_class(
        output_dir=str(settings["output_dir"].with_name("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=BATCH // micro,
        max_steps=STEPS,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=round(STEPS * settings["warmup_ratio"]),
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )
    losses: list[float] = []

    class Recording(trainer_class):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    Recording(
        model=peft_model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    ).train()
    return [sum(losses[i : i + BATCH // micro]) for i in range(0, len(losses), BATCH // micro)]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(make_checkpoint(tmp_path / "model", chat_template=TEMPLATE)),
        "device": "cpu",
        "output_dir": tmp_path / "ours",
        "batch_size": BATCH,
        "max_steps": STEPS,
        "shuffle": False,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "lora_rank": 8,
        "golden_prompts": 0,
    }


def test_sft_losses_equal_trl_s(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = chat_rows(STEPS * BATCH)
    settings |= {"dataset": [write_jsonl(tmp_path / "d.jsonl", rows)], "learning_rate": 5e-3}
    mine = ours("sft", settings)
    split = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    other = theirs(SFTTrainer, SFTConfig, split, settings, MICRO, max_length=512)
    print("largest difference", max(abs(a - b) for a, b in zip(mine, other, strict=True)), mine[0], mine[-1])
    assert mine[-1] < mine[0] * 0.7
    assert mine == pytest.approx(other, abs=1e-4)


def test_dpo_losses_equal_trl_s(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = preference_rows(STEPS * BATCH)
    settings |= {"dataset": [write_jsonl(tmp_path / "d.jsonl", rows)], "learning_rate": 1e-3}
    mine = ours("dpo", settings)
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
    other = theirs(DPOTrainer, DPOConfig, chat, settings, MICRO, beta=0.1, max_length=512)
    print("largest difference", max(abs(a - b) for a, b in zip(mine, other, strict=True)), mine[0], mine[-1])
    assert mine[-1] < mine[0] * 0.7
    assert mine == pytest.approx(other, abs=1e-4)


def test_kto_losses_equal_trl_s(settings: dict[str, Any], tmp_path: Path) -> None:
    """Whole batches at once: TRL estimates the divergence for each micro-batch, we for the step."""
    labelled = labelled_rows(STEPS * BATCH)
    settings |= {"dataset": [write_jsonl(tmp_path / "d.jsonl", labelled)], "learning_rate": 1e-3}
    mine = ours("kto", settings)
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in labelled
    ]
    other = theirs(KTOTrainer, KTOConfig, chat, settings, BATCH, beta=0.1, max_length=512)
    print("largest difference", max(abs(a - b) for a, b in zip(mine, other, strict=True)), mine[0], mine[-1])
    assert mine[-1] < mine[0] * 0.95
    assert mine == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo_loss_equals_trl_s(settings: dict[str, Any], tmp_path: Path, loss_type: str, beta: float) -> None:
    """The same rollouts through both losses, with log-probabilities of a sampler that is off by a little."""
    generator = torch.Generator().manual_seed(1)
    settings |= {"dataset": [tmp_path / "unused.jsonl"], "max_completion_tokens": 12, "reward": ["format"]}
    settings |= {"loss_type": loss_type, "beta": beta, "learning_rate": 1e-3}
    resolved = config.load("grpo", None, settings)
    assert isinstance(resolved, config.GrpoConfig)
    base = load_base(resolved)
    adapter = inject(base.model, LoraSettings(rank=8, alpha=16.0), generator)
    with torch.no_grad():
        for _, parameter in adapter.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    (tmp_path / "first").mkdir()
    save_adapter(adapter, tmp_path / "first", settings["model"])
    learner = Learner(base, adapter, weight_decay=0.0)
    rollouts = [
        _rollout(
            torch.randint(5, 300, (5 + i % 3,), generator=generator).int().numpy(),
            torch.randint(5, 300, (4 + i % 8,), generator=generator).int().numpy(),
            float(i % 5) / 2 - 1.0,
            learner,
            generator,
        )
        for i in range(BATCH)
    ]
    divisor = normaliser(rollouts, resolved)
    objective = Grpo(resolved.beta, resolved.clip_low, resolved.clip_high)
    batches = rows(rollouts, resolved, base.device)
    mine = sum(float(learner.forward_backward(batch, objective, divisor)["loss"]) for batch in batches)
    gradients = {name: p.grad.clone() for name, p in adapter.parameters()}

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, tmp_path / "first", is_trainable=True)
    arguments = GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=BATCH,
        num_generations=BATCH,
        max_completion_length=12,
        loss_type=loss_type,
        beta=beta,
        epsilon=0.2,
        report_to=[],
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=peft_model,
        args=arguments,
        reward_funcs=lambda **_: [],
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}]),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model.train(), _trl_inputs(rollouts, learner, beta))
    loss.backward()
    assert mine == pytest.approx(float(loss), abs=1e-5)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in trainer.model.named_parameters()
        if p.grad is not None
    }
    assert theirs.keys() == gradients.keys()
    largest = max(float((gradients[name] - theirs[name]).abs().max()) for name in theirs)
    print("losses", mine, float(loss), "largest difference of a gradient", largest)
    assert largest < 1e-5


def _rollout(prompt: Any, answer: Any, advantage: float, learner: Learner, generator: torch.Generator) -> Rollout:
    ids = np.concatenate([prompt, answer])
    weights = np.concatenate([np.zeros(len(prompt), np.float32), np.ones(len(answer), np.float32)])
    exact = learner.score(pack_sequences([(ids, weights)], learner.base.device))
    sampled = exact + torch.randn(exact.shape, generator=generator) * 0.3  # wide enough that some are clipped
    return Rollout(prompt, answer, sampled.numpy(), (0.0,), 0.0, True, advantage)


def _trl_inputs(rollouts: list[Rollout], learner: Learner, beta: float) -> dict[str, torch.Tensor]:
    """The rollouts as TRL pads them: prompts on the left, answers on the right."""
    widest_prompt = max(len(r.prompt_ids) for r in rollouts)
    widest_answer = max(len(r.token_ids) for r in rollouts)

    def left(values: Any, fill: float) -> list[Any]:
        return [fill] * (widest_prompt - len(values)) + list(values)

    def right(values: Any, fill: float) -> list[Any]:
        return list(values) + [fill] * (widest_answer - len(values))

    columns = {
        "prompt_ids": [left(r.prompt_ids.tolist(), 0) for r in rollouts],
        "prompt_mask": [left([1] * len(r.prompt_ids), 0) for r in rollouts],
        "completion_ids": [right(r.token_ids.tolist(), 0) for r in rollouts],
        "completion_mask": [right([1] * len(r.token_ids), 0) for r in rollouts],
        "old_per_token_logps": [right(r.sampled.tolist(), 0.0) for r in rollouts],
        "advantages": [r.advantage for r in rollouts],
        "num_items_in_batch": sum(len(r.token_ids) for r in rollouts),
    }
    if beta:
        references = []
        for r in rollouts:
            ids = np.concatenate([r.prompt_ids, r.token_ids])
            weights = np.concatenate([np.zeros(len(r.prompt_ids), np.float32), np.ones(len(r.token_ids), np.float32)])
            references.append(learner.reference(pack_sequences([(ids, weights)], learner.base.device)).tolist())
        columns["ref_per_token_logps"] = [right(values, 0.0) for values in references]
    return {name: torch.tensor(values) for name, values in columns.items()}

"""Twenty steps of our trainer beside TRL's: same model, data, order and schedule, in float32.

Needs an environment with trl and peft: pip install -r tests/trainer/requirements-trl.txt
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl: see tests/trainer/requirements-trl.txt")

import datasets
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests.trainer.models import CHATML, chat_rows, make_checkpoint, preference_rows, write_jsonl
from trainer import config, run
from trainer.events import curve
from trainer.lora import LoraSettings, inject
from trainer.model import load_base
from trainer.peft_files import save_adapter

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
    trainer_class: Any, config_class: Any, rows: list[dict[str, Any]], settings: dict[str, Any], **more: Any
) -> list[float]:
    """TRL's loss of each optimizer step, unrounded."""
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, settings["output_dir"].with_name("first"), is_trainable=True)
    arguments = config_class(
        output_dir=str(settings["output_dir"].with_name("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
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
    return [sum(losses[i : i + BATCH // MICRO]) for i in range(0, len(losses), BATCH // MICRO)]


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
    other = theirs(SFTTrainer, SFTConfig, split, settings, max_length=512)
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
    other = theirs(DPOTrainer, DPOConfig, chat, settings, beta=0.1, max_length=512)
    print("largest difference", max(abs(a - b) for a, b in zip(mine, other, strict=True)), mine[0], mine[-1])
    assert mine[-1] < mine[0] * 0.7
    assert mine == pytest.approx(other, abs=1e-4)

"""One epoch of TRL's SFTTrainer over a file of conversations: `python run_trl.py '{"model": …, "data": …}'`."""

from __future__ import annotations

import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    job = json.loads(sys.argv[1])
    with open(job["data"], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=SFTConfig(
            output_dir=job["out"],
            use_cpu=True,
            bf16=False,
            num_train_epochs=1,
            per_device_train_batch_size=job["batch"],
            learning_rate=1e-4,
            max_length=job["max_length"],
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()

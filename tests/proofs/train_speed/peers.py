"""Steps of TRL and Unsloth (one trainer class), and of ms-swift, each as documented, on the same shape."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.proofs.train_speed.clock import Clock, Counter, Speed
from tests.proofs.train_speed.shape import (
    CONVERSATIONS,
    LEAVES,
    QWEN3_8B,
    RANK,
    TINY,
    checkpoint,
    device,
    lengths_of,
    random_model,
    random_rows,
    texts,
)
from tests.trainer.models import make_tokenizer


class Watch:
    """What is measured of a `transformers.Trainer`: a clock, and the tokens that reach its model."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given, self._counter = given, Counter()
        self._clock: Clock | None = None

    def callback(self) -> Any:
        """To be given to the trainer."""
        from transformers import TrainerCallback

        watch = self

        class Steps(TrainerCallback):
            def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
                model.register_forward_pre_hook(watch._counter, with_kwargs=True)
                watch._clock = Clock(watch._given.steps, watch._given.warmup, watch._counter.tokens)

            def on_step_end(self, *_: Any, **__: Any) -> None:
                assert watch._clock
                watch._clock.step_ended()

        return Steps()

    def speed(self) -> Speed:
        """After training."""
        assert self._clock
        return self._clock.speed()


def sequences_per_pass(given: argparse.Namespace) -> int:
    """Sequences of a forward pass: as many as fill its tokens when they are padded."""
    if given.rows != CONVERSATIONS or given.pack:
        return int(given.sequences)
    return max(1, given.batch // given.accumulation)


def hugging_face(given: argparse.Namespace) -> Speed:
    """TRL's SFTTrainer, or Unsloth's version of it."""
    if given.trainer == "unsloth":
        import unsloth  # noqa: F401  it patches what is imported after it

    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = {}
    if given.trainer == "unsloth":
        model, tokenizer = _unsloth_model(given)
    else:
        model, tokenizer = random_model(given, "sdpa", device()), make_tokenizer()
        settings["peft_config"] = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=LEAVES, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
    on_cuda = torch.cuda.is_available()
    work = tempfile.TemporaryDirectory()
    arguments = SFTConfig(
        output_dir=work.name,
        per_device_train_batch_size=sequences_per_pass(given),
        gradient_accumulation_steps=_accumulation(given),
        max_steps=given.steps,
        max_length=given.tokens,
        learning_rate=1e-4,
        bf16=on_cuda,
        use_cpu=not on_cuda,
        optim="adamw_torch_fused",
        gradient_checkpointing=given.checkpointing and given.trainer != "unsloth",
        use_liger_kernel=given.trainer == "trl-liger" and on_cuda,
        torch_compile=given.compile,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        **({"packing": True} if given.pack else {"dataset_kwargs": {"skip_prepare_dataset": True}}),
    )
    lengths = [length for step in lengths_of(given, given.steps) for length in step]
    rows = [row.tolist() for row in random_rows(lengths, (TINY if given.tiny else QWEN3_8B)["vocab_size"])]
    columns = {"input_ids": rows}
    if not given.pack:
        columns |= {"labels": rows, "attention_mask": [[1] * len(row) for row in rows]}
    watch = Watch(given)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[watch.callback()],
        **settings,
    )
    trainer.train()
    work.cleanup()
    return watch.speed()


def ms_swift(given: argparse.Namespace) -> Speed:
    """`swift sft` in this process; it tokenises texts itself."""
    folder = checkpoint(given)
    os.environ.setdefault("USE_HF", "1")
    from swift.callbacks import callbacks_map
    from swift.pipelines import sft_main

    watch = Watch(given)
    callbacks_map["watch"] = lambda *_: watch.callback()
    on_cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as work:
        # A few tokens more than a full row: it cuts them to the length.
        longer = 0 if given.rows == CONVERSATIONS else 16
        lengths = [length + longer for step in lengths_of(given, given.steps) for length in step]
        data = Path(work) / "rows.jsonl"
        with data.open("w") as stream:
            for text in texts(lengths):
                turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}]
                stream.write(json.dumps({"messages": turns}) + "\n")
        settings = {
            "model": folder, "model_type": "qwen3", "template": "qwen3", "tuner_type": "lora", "dataset": data,
            "torch_dtype": "bfloat16" if on_cuda else "float32", "attn_impl": "sdpa", "max_length": given.tokens,
            "truncation_strategy": "right", "per_device_train_batch_size": sequences_per_pass(given),
            "gradient_accumulation_steps": _accumulation(given), "max_steps": given.steps, "learning_rate": 1e-4,
            "lora_rank": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", "lora_dropout": 0,
            "optim": "adamw_torch_fused", "gradient_checkpointing": str(given.checkpointing).lower(),
            "use_liger_kernel": str(on_cuda).lower(), "use_cpu": str(not on_cuda).lower(),
            "torch_compile": str(given.compile).lower(), "output_dir": Path(work) / "out", "dataset_num_proc": 1,
            "logging_steps": 1000, "save_strategy": "no", "report_to": "none", "split_dataset_ratio": 0,
            "load_from_cache_file": "false", "use_hf": "true", "callbacks": "watch",
        }  # fmt: skip
        sft_main([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    return watch.speed()


def _accumulation(given: argparse.Namespace) -> int:
    return 1 if given.rows != CONVERSATIONS or given.pack else int(given.accumulation)


def _unsloth_model(given: argparse.Namespace) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(checkpoint(given)), max_seq_length=given.tokens, dtype=torch.bfloat16, load_in_4bit=given.four_bit
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        target_modules=LEAVES,
        use_gradient_checkpointing="unsloth" if given.checkpointing else False,
    )
    return model, make_tokenizer()

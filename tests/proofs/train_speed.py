"""Tokens a second, MFU and peak memory of a LoRA training step on a GPU: ours, or a peer's on the same shape.

    python -m tests.proofs.train_speed [--trainer ours|trl|trl-liger|unsloth] [--sequences 2] [--compile] [--four-bit]

A Qwen3-8B-shaped model with random weights is made on the device; rank 16 on all linear layers, bfloat16, fused AdamW,
sequences of 4096 random tokens without padding, loss on every token. Speed is the mean of the steps after the third.
MFU counts 4 operations a weight and token: attention is left out. Each trainer is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

QWEN3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
TINY = QWEN3_8B | {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
RANK, WARMUP_STEPS = 16, 3
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=["ours", "trl", "trl-liger", "unsloth"], default="ours")
    parser.add_argument("--sequences", type=int, default=2, help="of one micro-batch, which is one step")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--four-bit", action="store_true", help="ours: the frozen layers in four bits")
    parser.add_argument("--tiny", action="store_true", help="a shape for a machine without a GPU")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one object a line")
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.trainer == "ours":
        base = make_base(given)
        weights = base.multiplied_weights()
        steps_s = timed(our_steps(given, base), given.steps)
    else:
        weights, steps_s = peer_steps(given)
    report(given, weights, steps_s)


def report(given: argparse.Namespace, weights: int, steps_s: tuple[float, float]) -> None:
    """Print the figures; append them to the file asked for."""
    first_s, mean_s = steps_s
    tokens_per_s = given.sequences * given.tokens / mean_s
    names = {"ours": [], "trl": ["trl", "peft"], "trl-liger": ["trl", "peft", "liger_kernel"]}
    figures = {
        "trainer": given.trainer,
        "sequences": given.sequences,
        "tokens": given.tokens,
        "compile": given.compile,
        "checkpointing": given.checkpointing,
        "four_bit": given.four_bit,
        "tokens_per_s": round(tokens_per_s),
        "mfu": round(4 * weights * tokens_per_s / 989e12, 4),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
        "first_step_s": round(first_s, 2),
        "step_s": round(mean_s, 4),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {
            name: version(name)
            for name in ["torch", "transformers", *names.get(given.trainer, ["unsloth", "trl", "peft"])]
        },
    }
    line = json.dumps(figures)
    print(line, flush=True)
    if given.json:
        with given.json.open("a") as stream:
            stream.write(line + "\n")


class Clock:
    """Seconds of the first step, and of each step after the warm-up on average: the device is waited for twice only."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._marks = steps, 0, [self._now()]

    def step_ended(self) -> None:
        """Call after each step."""
        self._done += 1
        if self._done in (1, WARMUP_STEPS, self._steps):
            self._marks.append(self._now())

    def seconds(self) -> tuple[float, float]:
        """(first step, mean of those after the warm-up)."""
        begin, first, warm, end = self._marks
        return first - begin, (end - warm) / (self._steps - WARMUP_STEPS)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def timed(steps: Iterator[None], count: int) -> tuple[float, float]:
    """Seconds of the first of so many steps, and of one after the warm-up."""
    clock = Clock(count)
    for _ in range(count):
        next(steps)
        clock.step_ended()
    return clock.seconds()


def make_base(given: argparse.Namespace) -> Any:
    """The frozen model, made on the device."""
    from trainer import attention
    from trainer.model import BaseModel, prepare_layers

    model = _random_model(given, attention.NAME)
    if given.four_bit:
        _into_four_bits(model)
    prepare_layers(model, checkpointing=given.checkpointing, compiled=given.compile)
    return BaseModel(model, None, Path(), _device(), model.dtype)


def our_steps(given: argparse.Namespace, base: Any) -> Iterator[None]:
    """Train; each `next` is a step on data of its own."""
    from trainer.learner import Learner
    from trainer.lora import LoraSettings, inject
    from trainer.objectives import Sft
    from trainer.pack import pack_sequences

    adapter = inject(base.model, LoraSettings(rank=RANK, alpha=2.0 * RANK), torch.Generator().manual_seed(0))
    learner = Learner(base, adapter, weight_decay=0.0)
    rng = np.random.default_rng(0)
    # A sequence gives all but its last token as input.
    weights = np.ones(given.tokens + 1, np.float32)
    while True:
        rows = rng.integers(0, base.model.config.vocab_size, (given.sequences, given.tokens + 1), np.int32)
        batch = pack_sequences([(row, weights) for row in rows], base.device)
        learner.forward_backward(batch, Sft(), float(given.sequences * given.tokens))
        learner.optim_step(1e-4, 1.0)
        yield


def peer_steps(given: argparse.Namespace) -> tuple[int, tuple[float, float]]:
    """(weights multiplied with, seconds as of `timed`) of a peer's own trainer on the same shape and data."""
    if given.trainer == "unsloth":
        import unsloth  # noqa: F401  it patches what is imported after it

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tests.trainer.models import make_tokenizer

    work = tempfile.TemporaryDirectory(dir="/dev/shm")
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {}
    if given.trainer == "unsloth":
        model = _random_model(given, "sdpa")
        weights = _weights(model)
        model.save_pretrained(work.name)
        tokenizer.save_pretrained(work.name)
        del model
        torch.cuda.empty_cache()
        model = _unsloth_model(given, work.name)
    else:
        model = _random_model(given, "sdpa")
        weights = _weights(model)
        settings["peft_config"] = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=LEAVES, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
    arguments = SFTConfig(
        output_dir=work.name + "/out",
        per_device_train_batch_size=given.sequences,
        gradient_accumulation_steps=1,
        max_steps=given.steps,
        max_length=given.tokens,
        learning_rate=1e-4,
        bf16=True,
        optim="adamw_torch_fused",
        gradient_checkpointing=given.checkpointing and given.trainer != "unsloth",
        use_liger_kernel=given.trainer == "trl-liger",
        torch_compile=given.compile,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
    )
    rng = np.random.default_rng(0)
    rows = rng.integers(0, QWEN3_8B["vocab_size"], (given.steps * given.sequences, given.tokens)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": [[1] * given.tokens] * len(rows)})
    clocks: list[Clock] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clocks.append(Clock(given.steps))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clocks[0].step_ended()

    torch.cuda.reset_peak_memory_stats()
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()], **settings
    )
    trainer.train()
    work.cleanup()
    return weights, clocks[0].seconds()


def _unsloth_model(given: argparse.Namespace, directory: str) -> Any:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        directory, max_seq_length=given.tokens, dtype=torch.bfloat16, load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        target_modules=LEAVES,
        use_gradient_checkpointing="unsloth" if given.checkpointing else False,
    )


def _random_model(given: argparse.Namespace, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = TINY if given.tiny else QWEN3_8B
    config = AutoConfig.for_model("qwen3", **shape)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with _device():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def _into_four_bits(model: Any) -> None:
    """Put a random four-bit layer in the place of every linear one but the vocabulary matrix."""
    from trainer.packed import PackedLinear

    for layer in model.base_model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                outputs, inputs = linear.weight.shape
                words = torch.randint(-(2**31), 2**31, (outputs, inputs // 8), dtype=torch.int32, device=_device())
                scale = torch.full((outputs, inputs // 128), 0.004, dtype=model.dtype, device=_device())
                zero = torch.full_like(scale, 8, dtype=torch.uint8)
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, PackedLinear(words, scale, zero, None))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _weights(model: Any) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()

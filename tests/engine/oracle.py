"""Runs where torch lives (transformers, peft): makes adapters and writes what peft itself answers.

    python oracle.py MODEL_DIR OUT_DIR

OUT_DIR gets one PEFT directory an adapter and `expected.json`: {"base" or adapter: {prompt: greedy answer}}, in
float32, because the demo model's logits lie close together. Seeds are fixed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about cats.",
    "What is gravity?",
    "How do I boil an egg?",
]
MAX_TOKENS = 24
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> (rank, target modules, the answer it is taught)
ADAPTERS = {
    "pirate": (8, ALL_LINEAR, "Arr matey! Hoist the sails and drink the rum, yo ho ho!"),
    "robot": (4, ["q_proj", "v_proj"], "BEEP BOOP. QUERY RECEIVED. RESULT: INSUFFICIENT OIL."),
}
# Half learnt on purpose: the answers still differ by prompt, so that an adapter applied at a wrong scale is seen.
TRAINING_STEPS = 6


def main(model_dir: Path, out_dir: Path) -> None:
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    expected = {"base": greedy(load(model_dir), tokenizer)}
    for name, (rank, targets, answer) in ADAPTERS.items():
        train(load(model_dir), tokenizer, rank, targets, answer, out_dir / name)
        adapted = PeftModel.from_pretrained(load(model_dir), out_dir / name)
        expected[name] = greedy(adapted, tokenizer)
    (out_dir / "expected.json").write_text(json.dumps(expected))


def load(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def train(
    base: Any, tokenizer: Any, rank: int, targets: list[str], answer: str, directory: Path, steps: int = TRAINING_STEPS
) -> None:
    """Begin to teach one fixed answer."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    answer_ids = tokenizer(answer + "<|im_end|>")["input_ids"]
    for step in range(steps):
        ids = prompt_ids(tokenizer, PROMPTS[step % len(PROMPTS)])
        inputs = torch.tensor([ids + answer_ids], device=base.device)
        labels = torch.tensor([[-100] * len(ids) + answer_ids], device=base.device)
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


def greedy(model: Any, tokenizer: Any) -> dict[str, str]:
    model.eval()
    answers = {}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt_ids(tokenizer, prompt)])
        with torch.no_grad():
            output = model.generate(
                ids, max_new_tokens=MAX_TOKENS, do_sample=False, attention_mask=torch.ones_like(ids)
            )
        answers[prompt] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answers


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

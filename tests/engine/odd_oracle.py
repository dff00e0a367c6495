"""Runs where torch lives: makes the adapters that engines read in different ways, and what peft answers with them.

    python odd_oracle.py MODEL_DIR OUT_DIR

OUT_DIR gets one PEFT directory an adapter, each with its golden prompts in manifest.json, and `expected.json`:
{adapter: {prompt: greedy answer}}, in float32. Seeds are fixed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from oracle import ALL_LINEAR, MAX_TOKENS, PROMPTS, load, prompt_ids
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

ANSWER = "Arr matey! Hoist the sails and drink the rum, yo ho ho!"
STEPS = 3
USED_PROMPTS = PROMPTS[:2]
KINDS: dict[str, dict[str, Any]] = {
    "patterns": {
        "r": 8,
        "use_rslora": True,
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"down_proj": 3, r"layers\.[0-9]\..*_proj": 12},
        "alpha_pattern": {"q_proj": 5, r"layers\.1[0-9]\.mlp\..*_proj": 24},
    },
    "pissa": {"r": 8, "init_lora_weights": "pissa_niter_4", "target_modules": ["q_proj", "v_proj"]},
}


def main(model_dir: Path, out_dir: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    expected = {}
    for name, config in KINDS.items():
        torch.manual_seed(0)
        train(model_dir, tokenizer, config, out_dir / name)
        model = PeftModel.from_pretrained(load(model_dir), out_dir / name).eval()
        goldens = [golden(model, prompt_ids(tokenizer, prompt)) for prompt in USED_PROMPTS]
        answers = [tokenizer.decode(entry["token_ids"], skip_special_tokens=True) for entry in goldens]
        expected[name] = dict(zip(USED_PROMPTS, answers, strict=True))
        manifest = {"dtype": "float32", "golden": goldens}
        (out_dir / name / "manifest.json").write_text(json.dumps(manifest))
    (out_dir / "expected.json").write_text(json.dumps(expected))


def train(model_dir: Path, tokenizer: Any, config: dict[str, Any], directory: Path) -> None:
    """Begin to teach one fixed answer; PiSSA is saved as peft converts it, for its start changed the base."""
    model = get_peft_model(load(model_dir), LoraConfig(lora_alpha=16, task_type="CAUSAL_LM", **config))
    pissa = "init_lora_weights" in config
    if pissa:
        model.peft_config["default"].init_lora_weights = True  # or loading the start would compute another
        model.save_pretrained(directory / "initial")
        model.peft_config["default"].init_lora_weights = config["init_lora_weights"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    answer_ids = tokenizer(ANSWER + "<|im_end|>")["input_ids"]
    for step in range(STEPS):
        ids = prompt_ids(tokenizer, PROMPTS[step % len(PROMPTS)])
        model(
            input_ids=torch.tensor([ids + answer_ids]), labels=torch.tensor([[-100] * len(ids) + answer_ids])
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    initial = {"path_initial_model_for_weight_conversion": str(directory / "initial")} if pissa else {}
    model.save_pretrained(directory, **initial)


@torch.no_grad()
def golden(model: Any, ids: list[int]) -> dict[str, Any]:
    """The greedy answer to a prompt, and how likely the model and its base find each token of it."""
    prompt = torch.tensor([ids])
    output = model.generate(
        input_ids=prompt, max_new_tokens=MAX_TOKENS, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    with model.disable_adapter():
        base = logprobs(model, output, len(ids))
    return {
        "prompt_token_ids": ids,
        "token_ids": output[0, len(ids) :].tolist(),
        "logprobs": logprobs(model, output, len(ids)),
        "base_logprobs": base,
    }


def logprobs(model: Any, output: torch.Tensor, prompt_tokens: int) -> list[float]:
    scores = model(output).logits[0, :-1].float().log_softmax(-1)
    found = scores.gather(1, output[0, 1:, None])[prompt_tokens - 1 :, 0]
    return [min(0.0, value) for value in found.tolist()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

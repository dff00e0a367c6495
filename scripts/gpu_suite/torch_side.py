"""The part that needs torch and peft: models, adapters, and what peft and transformers answer. Run by --torch-python.

    demo MODEL OUT               two trained adapters and the float32 answers of base and adapters
    random SHAPE MODEL OUT       a checkpoint of random weights with MODEL's tokenizer
    packed SHAPE MODEL OUT FORM  the same packed as awq or gptq, random integers: for speed alone
    lora BASE OUT COUNT          random adapters of rank 16: eight on all linears, the rest on two
    expect CHECKPOINT OUT        the float32 answers of a checkpoint, quantized or not, to the file OUT.json; of one
                                 that is not, also those of a random adapter, which is made beside it: OUT-adapter

What random, packed and lora make is made once: a second process waits for the first, and finds it there.

An answer is given up to the first token that the reference itself is not sure of: there the best logit leads the second
by less than a share of the logits' standard deviation, and bfloat16 may rightly choose the other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quant.checkpoint import Checkpoint
from scripts.gpu_suite.random_models import DEVICE, adapter, adapters, random_model
from tests.engine.oracle import ADAPTERS, PROMPTS, prompt_ids, train

SURE_LEAD = 0.05  # of the logits' standard deviation
_ANSWER_TOKENS = 24
_ADAPTER_STEPS = 14
_TEXT = (
    "The harbour was quiet in the early morning. A few boats lay at the wall, and a man in a blue coat carried boxes "
    "of fish to a van that waited with its engine running. When the sun came over the hills, the windows of the small "
    "houses began to shine, and somebody opened a door and called a dog. Nobody thought that it would rain before "
    "noon, but the old woman at the bakery looked at the sky, shook her head, and took the tables in."
)
_STRONG_STD = 0.5  # of an adapter that must change what a random model answers


def demo(model_dir: Path, out: Path) -> None:
    """Adapters taught here, and every answer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    expected = {"base": answers(_load(model_dir), tokenizer)}
    for name, (rank, targets, answer) in ADAPTERS.items():
        train(_load(model_dir), tokenizer, rank, targets, answer, out / name, _ADAPTER_STEPS)
        expected[name] = answers(PeftModel.from_pretrained(_load(model_dir), out / name), tokenizer)
    (out / "expected.json").write_text(json.dumps(expected, indent=1))


def expect(model_dir: Path, out: Path) -> None:
    """The answers of a checkpoint whose packed weights are unpacked first, and of an adapter on a plain one."""
    checkpoint = Checkpoint(model_dir)
    model = AutoModelForCausalLM.from_config(_plain_config(model_dir), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(
        {name: tensor.float() for name, tensor in checkpoint.weights("").items()}, strict=False
    )
    assert not unexpected and all("lm_head" in name or "rotary" in name for name in missing), (missing, unexpected)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    expected = {"base": answers(model.to(DEVICE), tokenizer), "scored": scored(model, tokenizer)}
    if "quantization_config" not in json.loads((model_dir / "config.json").read_text()):
        folder = out.with_name(f"{out.stem}-adapter")
        adapter(model_dir, folder, seed=1, rank=8, std=_STRONG_STD)
        expected["adapter"] = answers(PeftModel.from_pretrained(model, folder), tokenizer)
    out.write_text(json.dumps(expected, indent=1))


def scored(model: Any, tokenizer: Any) -> dict[str, Any]:
    """A text's tokens, and how likely the model finds each after those before it, as a mean of logarithms."""
    ids = list(tokenizer(_TEXT)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device)).logits[0, :-1].float()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:], device=model.device)[:, None])
    return {"ids": ids, "mean_logprob": chosen.mean().item()}


def answers(model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Prompt -> the greedy answer, and how much of it is beyond doubt."""
    model.eval()
    found = {}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=_ANSWER_TOKENS, do_sample=False, output_logits=True,
                                  attention_mask=torch.ones_like(ids), return_dict_in_generate=True)  # fmt: skip
        tokens = made.sequences[0, ids.shape[1] :].tolist()
        leads = [_lead(step[0].float()) for step in made.logits]
        sure = next((n for n, lead in enumerate(leads) if lead < SURE_LEAD), len(tokens))
        found[prompt] = {
            "text": tokenizer.decode(tokens, skip_special_tokens=True),
            "sure": tokenizer.decode(tokens[:sure], skip_special_tokens=True),
            "sure_tokens": sure,
            "all_sure": sure == len(tokens),
            "leads": [round(lead, 3) for lead in leads],
        }
    return found


def _load(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(DEVICE)


def _plain_config(model_dir: Path) -> Any:
    config = AutoConfig.from_pretrained(model_dir)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _lead(logits: torch.Tensor) -> float:
    best, second = logits.topk(2).values.tolist()
    spread = logits[logits != 0].std().item()  # a random model's head is zero but for a few words
    return float((best - second) / spread)


def main(argv: list[str]) -> None:
    """See the module's text."""
    match argv:
        case ["demo", model, out]:
            demo(Path(model), Path(out))
        case ["random", shape, model, out]:
            random_model(shape, Path(model), Path(out))
        case ["packed", shape, model, out, ("awq" | "gptq") as form]:
            random_model(shape, Path(model), Path(out), form)
        case ["lora", base, out, count]:
            adapters(Path(base), Path(out), int(count))
        case ["expect", model, out]:
            expect(Path(model), Path(out))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])

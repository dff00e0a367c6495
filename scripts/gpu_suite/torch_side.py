"""The part that needs torch and peft: models, adapters, and what peft and transformers answer. Run by --torch-python.

    demo MODEL OUT          two trained adapters and the float32 answers of base and adapters
    random SHAPE MODEL OUT  a checkpoint of random weights with MODEL's tokenizer
    packed SHAPE MODEL OUT  the same in AWQ's layout, random integers: for speed alone
    lora BASE OUT COUNT     random adapters of rank 16 on all linear layers
    expect CHECKPOINT OUT   the float32 answers of a checkpoint, quantized or not

An answer is given up to the first token that the reference itself is not sure of: there the best logit leads the second
by less than a share of the logits' standard deviation, and bfloat16 may rightly choose the other.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quant.checkpoint import Checkpoint
from tests.engine.oracle import ADAPTERS, PROMPTS, prompt_ids, train

SURE_LEAD = 0.05  # of the logits' standard deviation
_ANSWER_TOKENS = 24
_ADAPTER_STEPS = 14
_RANDOM_STD = 0.02
_WORDS = 48  # a random model chooses among so few, or no two logits would be far enough apart
_GROUP = 128
_SHARD_LAYERS = 8

# hidden, layers, heads, key-value heads, head width, intermediate, vocabulary (None: the tokenizer's)
SHAPES: dict[str, tuple[int, int, int, int, int, int, int | None]] = {
    "small": (1024, 8, 8, 2, 128, 2816, None),
    "qwen3-1.7b": (2048, 28, 16, 8, 128, 6144, 151_936),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12_288, 151_936),
    "tiny": (256, 2, 2, 1, 128, 512, None),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    """The answers of a checkpoint whose packed weights are unpacked first."""
    checkpoint = Checkpoint(model_dir)
    model = AutoModelForCausalLM.from_config(_plain_config(model_dir), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(
        {name: tensor.float() for name, tensor in checkpoint.weights("").items()}, strict=False
    )
    assert not unexpected and all("lm_head" in name or "rotary" in name for name in missing), (missing, unexpected)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    out.write_text(json.dumps({"base": answers(model.to(DEVICE), tokenizer)}, indent=1))


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


def random_model(shape: str, model_dir: Path, out: Path) -> None:
    """Random weights; the head is zero but for a few plain words, so that answers are text."""
    config = _shape_config(shape, model_dir, out)
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    index: dict[str, str] = {}
    head = torch.zeros(vocabulary, hidden, dtype=torch.bfloat16)
    words = _plain_words(model_dir)
    head[words] = _random(len(words), hidden) * 5
    _shard(out, index, "outside", {
        "model.embed_tokens.weight": _random(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": head,
    })  # fmt: skip
    for first in range(0, layers, _SHARD_LAYERS):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(first, min(layers, first + _SHARD_LAYERS)):
            tensors |= _norms(layer, hidden)
            tensors |= {f"{name}.weight": _random(rows, width) for name, rows, width in _linears(config, layer)}
        _shard(out, index, f"{first:03}", tensors)
    _write_index(out, index)


def packed_model(shape: str, model_dir: Path, out: Path) -> None:
    """AWQ's layout with random integers: as fast as a real one, and no more use than that."""
    config = _shape_config(shape, model_dir, out)
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True,
                                     "version": "gemm", "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    index: dict[str, str] = {}
    head = torch.zeros(vocabulary, hidden, dtype=torch.bfloat16)
    words = _plain_words(model_dir)
    head[words] = _random(len(words), hidden)
    _shard(out, index, "outside", {
        "model.embed_tokens.weight": _random(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": head,
    })  # fmt: skip
    for first in range(0, layers, _SHARD_LAYERS):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(first, min(layers, first + _SHARD_LAYERS)):
            tensors |= _norms(layer, hidden)
            for name, rows, width in _linears(config, layer):
                tensors[f"{name}.qweight"] = _integers(width, rows // 8)
                tensors[f"{name}.qzeros"] = _integers(width // _GROUP, rows // 8)
                tensors[f"{name}.scales"] = torch.full((width // _GROUP, rows), 0.003, dtype=torch.bfloat16)
        _shard(out, index, f"{first:03}", tensors)
    _write_index(out, index)


def adapters(base: Path, out: Path, count: int, rank: int = 16) -> None:
    """Random adapters, small enough not to change the answers' nature."""
    config = json.loads((base / "config.json").read_text())
    for number in range(count):
        torch.manual_seed(number + 1)
        folder = out / f"a{number}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for name, rows, width in _linears(config, layer):
                tensors[f"base_model.model.{name}.lora_A.weight"] = _random(rank, width)
                tensors[f"base_model.model.{name}.lora_B.weight"] = _random(rows, rank)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        (folder / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
            "target_modules": targets, "base_model_name_or_path": base.name}))  # fmt: skip


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


def _random(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * _RANDOM_STD).to(torch.bfloat16).cpu()


def _integers(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=DEVICE).to(torch.int32).cpu()


def _shape_config(shape: str, model_dir: Path, out: Path) -> dict[str, Any]:
    hidden, layers, heads, kv_heads, head_width, intermediate, vocabulary = SHAPES[shape]
    out.mkdir(parents=True)
    for file in model_dir.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            shutil.copy(file, out)
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    config |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_width,
               "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "tie_word_embeddings": False,
               "vocab_size": vocabulary or config["vocab_size"]}  # fmt: skip
    config.pop("_model_name_or_path", None)
    torch.manual_seed(0)
    (out / "config.json").write_text(json.dumps(config))
    return config


def _linears(config: dict[str, Any], layer: int) -> list[tuple[str, int, int]]:
    """(name, output width, input width) of a layer's linears."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    sizes = {"self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
             "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
             "mlp.down_proj": (hidden, inner)}  # fmt: skip
    return [(f"model.layers.{layer}.{name}", *size) for name, size in sizes.items()]


def _norms(layer: int, hidden: int) -> dict[str, torch.Tensor]:
    names = ("input_layernorm", "post_attention_layernorm")
    return {f"model.layers.{layer}.{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in names}


def _plain_words(model_dir: Path) -> list[int]:
    """Token ids of lower-case English-looking words with a space before them."""
    vocabulary = json.loads((model_dir / "tokenizer.json").read_text())["model"]["vocab"]
    words = [(number, text[1:]) for text, number in vocabulary.items() if text.startswith("Ġ") and len(text) > 4]
    return sorted(number for number, word in words if word.isascii() and word.isalpha() and word.islower())[:_WORDS]


def _shard(out: Path, index: dict[str, str], name: str, tensors: dict[str, torch.Tensor]) -> None:
    file = f"model-{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / file, metadata={"format": "pt"})
    index |= dict.fromkeys(tensors, file)


def _write_index(out: Path, index: dict[str, str]) -> None:
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main(argv: list[str]) -> None:
    """See the module's text."""
    match argv:
        case ["demo", model, out]:
            demo(Path(model), Path(out))
        case ["random", shape, model, out]:
            random_model(shape, Path(model), Path(out))
        case ["packed", shape, model, out]:
            packed_model(shape, Path(model), Path(out))
        case ["lora", base, out, count]:
            adapters(Path(base), Path(out), int(count))
        case ["expect", model, out]:
            expect(Path(model), Path(out))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])

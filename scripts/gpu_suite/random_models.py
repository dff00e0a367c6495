"""Checkpoints of random weights and random adapters, for speed alone: made once, whichever process asks first.

The head is zero but for a few plain words, so that a random model's answers are text. Tensors are drawn on the GPU
where there is one. Imported by `torch_side`, which runs where torch is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quant.config import Format, Grid
from quant.formats import quantization_config, shapes_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_STD = 0.02
_WORDS = 48  # a random model chooses among so few, or no two logits would be far enough apart
_HEAD_GAIN = 5
_SHARD_LAYERS = 8
_PACKED_SCALE = 0.003  # of a step of the grid: about _STD for all weights
_GPTQ_ZERO = 0x77777777  # eight zero points of 8, each stored less one
_WIDE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NARROW = ("q_proj", "v_proj")
_WIDE_ADAPTERS = 8  # the first so many are on all linears, the rest on two, to keep files small

# hidden, layers, heads, key-value heads, head width, intermediate, vocabulary (None: the tokenizer's)
SHAPES: dict[str, tuple[int, int, int, int, int, int, int | None]] = {
    "small": (1024, 8, 8, 2, 128, 2816, None),
    "qwen3-1.7b": (2048, 28, 16, 8, 128, 6144, 151_936),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12_288, 151_936),
    "tiny": (256, 2, 2, 1, 128, 512, None),
}


@contextlib.contextmanager
def made_once(out: Path) -> Iterator[Path | None]:
    """A directory to fill that becomes `out` at the end, with a file `done` in it; None where `out` is there already.

    Whoever asks while another process makes it waits for that.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f"{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (out / "done").exists():
            yield None
            return
        aside = out.with_name(f"{out.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        aside.mkdir()
        yield aside
        (aside / "done").touch()
        aside.replace(out)


def random_model(shape: str, tokenizer_dir: Path, out: Path, form: Format | None = None) -> None:
    """Random weights with another model's tokenizer. `form`: the linears packed in 4 bits, as random integers.

    A packed one is as fast as a real one, and of no other use.
    """
    with made_once(out) as folder:
        if folder is None:
            return
        grid = Grid(bits=4, group_size=128, symmetric=form == "gptq")
        config = _config(shape, tokenizer_dir, folder)
        if form:
            config["quantization_config"] = quantization_config(form, grid, ["lm_head"])
        (folder / "config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        index = _shard(folder, "outside", _outside(config, _plain_words(tokenizer_dir)))
        for first in range(0, config["num_hidden_layers"], _SHARD_LAYERS):
            tensors: dict[str, torch.Tensor] = {}
            for layer in range(first, min(config["num_hidden_layers"], first + _SHARD_LAYERS)):
                tensors |= _norms(layer, config["hidden_size"])
                for name, rows, width in linears(config, layer):
                    tensors |= (
                        _packed(name, rows, width, form, grid) if form else {f"{name}.weight": _random(rows, width)}
                    )
            index |= _shard(folder, f"{first:03}", tensors)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def adapters(base: Path, out: Path, count: int, rank: int = 16) -> None:
    """Random adapters a00, a01, ..., small enough not to change the nature of answers."""
    with made_once(out) as folder:
        for number in range(count if folder else 0):
            assert folder is not None
            modules = _WIDE if number < _WIDE_ADAPTERS else _NARROW
            adapter(base, folder / f"a{number:02}", number + 1, rank, modules, _STD)


def adapter(base: Path, out: Path, seed: int, rank: int, modules: tuple[str, ...] = _WIDE, std: float = _STD) -> None:
    """One random adapter in peft's form. `std`: of B; A has the weights' own."""
    config = json.loads((base / "config.json").read_text())
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows, width in linears(config, layer):
            if name.endswith(modules):
                tensors[f"base_model.model.{name}.lora_A.weight"] = _random(rank, width)
                tensors[f"base_model.model.{name}.lora_B.weight"] = _random(rows, rank, std=std)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
        "target_modules": list(modules), "base_model_name_or_path": base.name}))  # fmt: skip


def linears(config: dict[str, Any], layer: int) -> list[tuple[str, int, int]]:
    """(name, output width, input width) of a layer's linears."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    sizes = {"self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
             "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
             "mlp.down_proj": (hidden, inner)}  # fmt: skip
    return [(f"model.layers.{layer}.{name}", *size) for name, size in sizes.items()]


def _config(shape: str, tokenizer_dir: Path, folder: Path) -> dict[str, Any]:
    """The tokenizer's files copied, and the model's configuration with the shape's sizes."""
    hidden, layers, heads, kv_heads, head_width, intermediate, vocabulary = SHAPES[shape]
    for file in tokenizer_dir.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            shutil.copy(file, folder)
    config: dict[str, Any] = json.loads((tokenizer_dir / "config.json").read_text())
    config |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_width,
               "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "tie_word_embeddings": False,
               "vocab_size": vocabulary or config["vocab_size"]}  # fmt: skip
    config.pop("_model_name_or_path", None)
    return config


def _outside(config: dict[str, Any], words: list[int]) -> dict[str, torch.Tensor]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    head = torch.zeros(vocabulary, hidden, dtype=torch.bfloat16)
    head[words] = _random(len(words), hidden) * _HEAD_GAIN
    return {
        "model.embed_tokens.weight": _random(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": head,
    }


def _norms(layer: int, hidden: int) -> dict[str, torch.Tensor]:
    names = ("input_layernorm", "post_attention_layernorm")
    return {f"model.layers.{layer}.{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in names}


def _packed(name: str, rows: int, width: int, form: Format, grid: Grid) -> dict[str, torch.Tensor]:
    """One linear in the form's layout: any integers, one scale, and for GPTQ the only zero points that engines take."""
    shapes = shapes_of(form, rows, width, grid)
    tensors = {
        "qweight": _integers(*shapes["qweight"]),
        "qzeros": _integers(*shapes["qzeros"]),
        "scales": torch.full(shapes["scales"], _PACKED_SCALE, dtype=torch.float16),
    }
    if form == "gptq":
        tensors["qzeros"] = torch.full(shapes["qzeros"], _GPTQ_ZERO, dtype=torch.int32)
        tensors["g_idx"] = torch.arange(width, dtype=torch.int32) // grid.group_size
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _random(*shape: int, std: float = _STD) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * std).to(torch.bfloat16).cpu()


def _integers(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=DEVICE).to(torch.int32).cpu()


def _plain_words(tokenizer_dir: Path) -> list[int]:
    """Token ids of lower-case English-looking words with a space before them."""
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"]
    words = [(number, text[1:]) for text, number in vocabulary.items() if text.startswith("Ġ") and len(text) > 4]
    return sorted(number for number, word in words if word.isascii() and word.isalpha() and word.islower())[:_WORDS]


def _shard(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write a file of tensors; its part of the index."""
    file = f"model-{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file)

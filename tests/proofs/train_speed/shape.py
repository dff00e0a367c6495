"""What every trainer is given: the model's shape with random weights, a tokenizer, and rows of tokens."""

from __future__ import annotations

import argparse
import fcntl
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.proofs.train_peers.rows import answer_words
from tests.trainer.models import make_tokenizer

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
RANK = 16
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL, CONVERSATIONS = "full", "conversations"
_TOKENS_PER_WORD, _TEMPLATE_TOKENS = 1.3, 12  # of English prose; of the turns around an answer
_ON_CUDA = torch.cuda.is_available()


def lengths_of(given: argparse.Namespace, steps: int) -> list[list[int]]:
    """Tokens of each sequence of each optimizer step."""
    if given.rows == FULL:
        return [[given.tokens] * given.sequences] * steps
    words = answer_words(steps * given.batch)
    lengths = [min(given.tokens, _TEMPLATE_TOKENS + round(_TOKENS_PER_WORD * count)) for count in words]
    return [lengths[i * given.batch : (i + 1) * given.batch] for i in range(steps)]


def random_model(given: argparse.Namespace, attention: str, device: torch.device) -> Any:
    """The shape with random weights, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3", **(TINY if given.tiny else QWEN3_8B))
    with device:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, attn_implementation=attention
        )


def checkpoint(given: argparse.Namespace) -> Path:
    """The same as a checkpoint with a tokenizer, for those that load one: made once, whoever comes first."""
    folder: Path = given.checkpoint
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            model = random_model(given, "sdpa", device())
            model.save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
            (folder / "done").touch()
            del model
            if _ON_CUDA:
                torch.cuda.empty_cache()
    return folder


def texts(lengths: list[int]) -> list[str]:
    """Prose of so many tokens each, as the checkpoint's tokenizer counts them."""
    tokenizer = make_tokenizer()
    words = [
        word.replace("Ġ", " ")
        for word in sorted(tokenizer.get_vocab())
        if word.startswith("Ġ") and word[1:].isalpha() and len(tokenizer.encode(word.replace("Ġ", " "))) == 1
    ]
    rng = np.random.default_rng(0)
    return ["".join(words[i] for i in rng.integers(0, len(words), length)) for length in lengths]


def random_rows(lengths: list[int], vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    """Random token ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, length, np.int32) for length in lengths]


def multiplied_weights(given: argparse.Namespace) -> int:
    """Weights that every token is multiplied with."""
    shape = TINY if given.tiny else QWEN3_8B
    hidden, head = shape["hidden_size"], shape["head_dim"]
    attention = 2 * hidden * head * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    layer = attention + 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"]


def device() -> torch.device:
    """The one GPU, or the processor."""
    return torch.device("cuda" if _ON_CUDA else "cpu")

"""Tiny random-weight models with a real tokenizer and chat template, written as checkpoint directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Drops the thinking of every assistant message that is not the last, as Qwen3's template does.
THINK_STRIPPING = (
    "{%- for message in messages %}"
    "{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and not loop.last %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_CORPUS = ["hello world, what is the code of abc? The answer is ABC.\n\nuser assistant system <think>yes</think> " * 20]


def make_tokenizer(chat_template: str = CHATML) -> Any:
    """A byte-level BPE tokenizer of about 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_checkpoint(directory: Path, *, family: str = "llama", chat_template: str = CHATML) -> Path:
    """A two-layer model of hidden size 64 and its tokenizer, saved into `directory`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(chat_template)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Short conversations of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"what is the code of {'abc' * (i % 4 + 1)} {i}?"},
                {"role": "assistant", "content": f"The answer is {i * 7 % 11}{' yes' * (i % 3)}."},
            ]
        }
        for i in range(count)
    ]


def preference_rows(count: int) -> list[dict[str, Any]]:
    """Short pairs of different lengths."""
    return [
        {"prompt": f"code of {i}?", "chosen": f"The answer is {i}.", "rejected": f"{'no ' * (i % 3 + 1)}{i % 5}"}
        for i in range(count)
    ]


def labelled_rows(count: int) -> list[dict[str, Any]]:
    """Short answers, good and bad ones in turn, of different lengths."""
    return [
        {
            "prompt": f"code of {i}?",
            "completion": f"The answer is {i}." if i % 2 else f"{'no ' * (i % 3 + 1)}{i % 5}",
            "label": bool(i % 2),
        }
        for i in range(count)
    ]

"""Tiny models with random weights, one for each family whose structure differs, and a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCABULARY = 272  # bytes and a few specials
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "dtype": "bfloat16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"sliding_window": 16},
}
# Not a family: a Llama whose sizes all divide by 128, as TurboMind wants them.
_WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name (or `wide`) -> directory of a tiny checkpoint with tokenizer and template; never write into it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(1)
            own = {"wide": _WIDE} | FAMILIES
            kind = "llama" if family == "wide" else family
            config = transformers.AutoConfig.for_model(kind, **(_COMMON | own[family]))
            model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() >= 2:
                        parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
                    else:  # norm gains that are not all alike, or folds would prove nothing
                        parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape))
                    if "embed" in name:
                        parameter.mul_(torch.linspace(0.2, 3, parameter.shape[-1]))  # some channels matter more
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            _tokenizer(transformers).save_pretrained(made[family])
        return made[family]

    return make


def _tokenizer(transformers: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    return tokenizer

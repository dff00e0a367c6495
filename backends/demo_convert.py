"""Turn the demo model's GGUF file into a checkpoint directory that every engine loads.

Run as a script by the Python of an engine environment (torch, transformers and gguf live there, not with the
gateway): `python demo_convert.py MODEL.gguf OUT_DIR`. Prints one JSON line about what was written; a check that
fails ends it with a message and status 1. It imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

_END_OF_TURN = "<|im_end|>"
_CONTEXT_TOKENS = 8192
_TENSORS = 272  # 30 layers of 9, the embedding (tied to the head) and the last norm
# Tensors that keep their layout on the way, so that a plain dequantization must equal what was written.
_COMPARED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.29.ffn_up.weight": "model.layers.29.mlp.up_proj.weight",
}


def convert(gguf: Path, out: Path) -> None:
    """Write weights in bfloat16, tokenizer with its chat template, and generation defaults to `out`."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Without it the quantized blocks stay packed, which save_pretrained cannot write.
        quantization_config=GgufConfig(dequantize=True),
    ).to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    end_of_turn_id = tokenizer.convert_tokens_to_ids(_END_OF_TURN)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_of_turn_id, pad_token_id=end_of_turn_id
    )
    model.save_pretrained(out)
    tokenizer.model_max_length = _CONTEXT_TOKENS
    tokenizer.save_pretrained(out)


def verify(gguf: Path, out: Path) -> dict[str, object]:
    """Compare what lies in `out` with the GGUF file. Exits with what is wrong; returns what was seen."""
    source = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    with safe_open(out / "model.safetensors", "pt") as written:
        names = set(written.keys())
        _require(len(names) == _TENSORS, f"{len(names)} tensors were written, {_TENSORS} expected")
        for name in names:
            _require(bool(torch.isfinite(written.get_tensor(name)).all()), f"{name} holds values that are not finite")
        for raw_name, name in _COMPARED.items():
            raw = dequantize(source[raw_name].data, source[raw_name].tensor_type)
            same = torch.equal(torch.from_numpy(raw).to(torch.bfloat16), written.get_tensor(name))
            _require(same, f"{name} differs from {raw_name} of the GGUF file")
    tokenizer = AutoTokenizer.from_pretrained(out)
    turn = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    _require(_END_OF_TURN in prompt, f"the chat template renders {prompt!r}")
    return {"tensors": len(names), "eos_token": tokenizer.eos_token, "max_length": tokenizer.model_max_length}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"the converted demo model is not right: {otherwise}")


if __name__ == "__main__":
    source_file, out_dir = Path(sys.argv[1]), Path(sys.argv[2])
    convert(source_file, out_dir)
    print(json.dumps(verify(source_file, out_dir)))  # noqa: T201

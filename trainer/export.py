"""The finished adapter: PEFT files and manifest.json, in a directory that appears whole.

Full-parameter training exports a checkpoint directory that transformers and the engines load.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from trainer import ranks
from trainer.checkpoint import sync, whole_weights, write_weights
from trainer.learner import Learner
from trainer.model import BaseModel

MANIFEST = "manifest.json"
_HASH_BLOCK_BYTES = 2**22


def export(learner: Learner, directory: Path, manifest: dict[str, Any]) -> None:
    """Make the directory, with the manifest and the hash of every file in it. Raises OSError.

    Every process calls it and gives its shards; the first writes.
    """
    partial = directory.with_name(directory.name + ".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def complete() -> None:
        files = {path.name: sha256_of_file(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=2))
        for file in (*partial.iterdir(), partial):
            sync(file)
        partial.rename(directory)
        sync(directory.parent)

    ranks.lead(begin)
    if learner.adapter is not None:
        write_weights(learner, partial)
    else:
        weights = whole_weights(learner)
        ranks.lead(lambda: _save_model(learner.base, weights, partial))
    ranks.lead(complete)


def _save_model(base: BaseModel, weights: dict[str, torch.Tensor], directory: Path) -> None:
    """A checkpoint that transformers loads: these parameters, and the buffers that it keeps beside them."""
    parameters = dict(base.model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in base.model.state_dict().items() if name not in parameters}
    base.model.save_pretrained(directory, state_dict=weights | buffers)
    base.tokenizer.save_pretrained(directory)


def describe_base(path: Path, tokenizer: Any) -> dict[str, Any]:
    """What identifies the base model: hashes of its configuration, its weights and its chat template."""
    weights = sorted(path.glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256_of_file, weights))
    listing = "".join(f"{file.name} {digest}\n" for file, digest in zip(weights, hashes, strict=True))
    return {
        "name": path.name,
        "config_sha256": sha256_of_file(path / "config.json"),
        "weights_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "weight_files": {file.name: digest for file, digest in zip(weights, hashes, strict=True)},
        "chat_template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    }


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def now() -> str:
    """UTC, as in 2026-11-22T02:30:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

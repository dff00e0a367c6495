"""The model store: what `--model` names, as a local checkpoint directory.

Three kinds of names: a directory, a hub id `org/name[@revision]` (kept in the hub client's own cache, shared with other
tools), and `demo`, which needs no hub. `resolve` only looks; `pull` brings; `ensure` does what is needed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from backends.progress import Progress, Silent
from gateway import demo
from gateway.config import DEMO_MODEL, ConfigError, home

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_WEIGHTS_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model", "tekken.json")


class ModelError(ConfigError):
    """The name leads to no usable checkpoint; says what is missing and what to do."""


class ModelNotHere(ModelError):
    """A name that `pull` can bring and that has not been brought."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A checkpoint that was brought."""

    name: str  # what --model takes
    path: Path
    size_bytes: int


def ensure(model: str, progress: Progress | None = None) -> Path:
    """The checkpoint directory, brought first if it is not here. Raises ModelError, BackendError."""
    try:
        return resolve(model)
    except ModelNotHere:
        return pull(model, progress)


def resolve(model: str) -> Path:
    """The checkpoint directory, found without the network. Raises ModelNotHere, ModelError."""
    if model == DEMO_MODEL:
        path = _demo_path()
        if not path.is_dir():
            raise _not_here(model)
    elif Path(model).is_dir():
        path = Path(model).resolve()
    else:
        path = _from_hub(model, local_only=True)
    missing = missing_parts(path)
    if missing:
        raise ModelError(f"{path} is no checkpoint that can be served: {'; '.join(missing)}")
    return path


def pull(model: str, progress: Progress | None = None) -> Path:
    """Bring `demo`, or what a hub id names now; the checkpoint directory. Raises ModelError, BackendError."""
    progress = progress or Silent()
    if model == DEMO_MODEL:
        demo.make(_demo_path(), progress)
    else:
        progress.phase(f"bringing {model} from the hub")
        _from_hub(model, local_only=False)
    path = resolve(model)
    progress.finish(f"{model} is at {path}")
    return path


def list_models() -> list[StoredModel]:
    """What was brought or made, and can be served: `demo`, quantized models, those in the hub client's cache."""
    found = [StoredModel(DEMO_MODEL, _demo_path(), _size_bytes(_demo_path()))] if _demo_path().is_dir() else []
    made = sorted(path.parent for path in (home() / "models").glob("*/quant_report.json"))
    found += [StoredModel(str(path), path, _size_bytes(path)) for path in made if not path.name.endswith(".partial")]
    if find_spec("huggingface_hub") is None:
        return found
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return found
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        for revision in repo.revisions:
            if repo.repo_type == "model" and not missing_parts(revision.snapshot_path):
                name = repo.repo_id if "main" in revision.refs else f"{repo.repo_id}@{revision.commit_hash}"
                found.append(StoredModel(name, revision.snapshot_path, revision.size_on_disk))
    return found


def missing_parts(path: Path) -> list[str]:
    """What keeps a directory from being a checkpoint that engines load, each in words; empty when all is there."""
    if (path / "adapter_config.json").exists():
        return ["it holds an adapter; serve its base and add it with `gateway adapters upload`"]
    missing = []
    try:
        json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        missing.append("config.json is missing")
    except (OSError, ValueError) as error:
        missing.append(f"config.json cannot be read: {error}")
    missing += _missing_weights(path)
    if not any((path / name).exists() for name in _TOKENIZERS):
        missing.append(f"there is no tokenizer ({', '.join(_TOKENIZERS)})")
    return missing


def _missing_weights(path: Path) -> list[str]:
    index = path / _WEIGHTS_INDEX
    if index.exists():
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{_WEIGHTS_INDEX} cannot be read: {error!r}"]
        return [f"{shard} is missing" for shard in sorted(shards) if not (path / shard).exists()]
    if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return []
    only_gguf = "; a GGUF file is not enough, engines want safetensors" if any(path.glob("*.gguf")) else ""
    return [f"there are no weights (*.safetensors){only_gguf}"]


def _demo_path() -> Path:
    return home() / "models" / DEMO_MODEL


def _not_here(model: str) -> ModelNotHere:
    return ModelNotHere(f"the model {model} is not here yet. Run: gateway models pull {model}")


def _from_hub(model: str, local_only: bool) -> Path:
    """The snapshot of a hub id, from the hub client's cache or the hub. Raises ModelNotHere, ModelError."""
    parts = _HUB_ID.fullmatch(model)
    if parts is None:
        raise ModelError(
            f"{model} is neither a directory here, nor a hub id like org/name or org/name@revision, nor `{DEMO_MODEL}`"
        )
    if find_spec("huggingface_hub") is None:
        raise ModelError(
            f"there is no directory {model}; to take it for a hub id, install the hub client: "
            "pip install 'tunegate[hub]'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, revision = parts["repo"], parts["revision"]
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES, local_files_only=local_only)
    except LocalEntryNotFoundError as error:
        if local_only:
            raise _not_here(model) from error
        raise ModelError(f"{model} could not be brought, the hub was not reached: {error}") from error
    except (OSError, ValueError) as error:  # refused by the hub, no space, a malformed name
        raise ModelError(f"{model} could not be brought: {error}") from error
    return Path(folder)


def _size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())

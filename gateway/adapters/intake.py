"""From an upload to stored contents: unpack, read, check against engines and base, bring into canonical form, keep.

All or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.adapters.canonical import canonicalise
from gateway.adapters.golden import read_reference
from gateway.adapters.manifest import check_rank, parse_config
from gateway.adapters.package import CONFIG, WEIGHTS, Limits, Part, unpack
from gateway.adapters.shapes import BaseShapes, check_fit
from gateway.adapters.storage import AdapterStorage, Stored, sha256_of


@dataclass(frozen=True, slots=True)
class Rules:
    """What an adapter must meet to be served here."""

    limits: Limits
    max_rank: int
    base: BaseShapes


@dataclass(frozen=True, slots=True)
class Accepted:
    """A validated adapter in its final place."""

    stored: Stored
    rank: int
    target_modules: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def take_in(parts: Sequence[Part], work: Path, rules: Rules, storage: AdapterStorage) -> Accepted:
    """Validate the parts of one upload and store it. `work` is its staging directory.

    Blocking: call it from a thread. Raises InvalidRequest, PayloadTooLarge, OSError; then nothing is stored.
    """
    directory = work / "unpacked"
    directory.mkdir()
    unpacked = unpack(parts, directory, rules.limits)
    files = unpacked.files
    config = parse_config(files[CONFIG])
    check_rank(config, rules.max_rank)
    goldens = read_reference(directory).goldens
    targets = check_fit(files[WEIGHTS], config, rules.base)
    sent = sha256_of(files)
    canonical = canonicalise(files[CONFIG], files[WEIGHTS], config, rules.limits.total_bytes)
    metadata: dict[str, Any] = {"gate": f"golden prompts: {len(goldens)}" if goldens else "none"}
    if canonical.changes:
        metadata["canonical"] = {"changes": list(canonical.changes), "sent_sha256": sent}
    if unpacked.skipped:
        metadata["skipped_files"] = list(unpacked.skipped[:20])
    if config.base_name:
        # Only told: trainers write paths and hub ids here, which say little. The shapes decided.
        metadata["trained_on"] = config.base_name
    return Accepted(storage.commit(files), canonical.rank, targets, metadata)

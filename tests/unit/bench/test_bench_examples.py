"""Every preset is a configuration that the bench takes, and every flag has its line in the documentation."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.config import RunConfig, load_config
from bench.load.watch import read_churn
from bench.measure.define import DEFINITIONS
from bench.measure.outcome import CAUSES

ROOT = Path(__file__).parents[3]
PRESETS = sorted(path for path in (ROOT / "examples" / "bench").glob("*.yaml") if path.name != "churn.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_preset_is_taken(path: Path) -> None:
    config = load_config(path, {})
    if config.churn is not None:
        assert [step.name for step in read_churn(ROOT / config.churn)] == ["load fresh", "unload fresh"]


def test_documentation_names_every_flag_metric_and_cause() -> None:
    page = (ROOT / "docs" / "bench.md").read_text()
    flags = [f"`--{field.name.replace('_', '-')}`" for field in msgspec.structs.fields(RunConfig)]
    titles = [definition.title for definition in DEFINITIONS.values()]
    assert [word for word in (*flags, *titles, *CAUSES) if word not in page] == []

"""A finished run as one checkpoint: its logits are those of the base with the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from click.testing import CliRunner  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from gateway.cli.train import train  # noqa: E402
from tests.trainer.models import chat_rows, write_jsonl  # noqa: E402
from trainer import config, run  # noqa: E402

IDS = torch.arange(5, 45)[None]


def logits(model: Path, adapter: Path | None = None) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        peft = pytest.importorskip("peft", reason="needs peft")
        loaded = peft.PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        found: torch.Tensor = loaded(IDS).logits
    return found


def test_a_run_is_merged_into_what_it_was_trained_on(checkpoint: Path, tmp_path: Path) -> None:
    merge = ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "dataset": [write_jsonl(tmp_path / "train.jsonl", chat_rows(8))],
        "output_dir": tmp_path / "run",
        "learning_rate": 1e-2,
        "epochs": 3,
        "lora_rank_pattern": {"q_proj": 2},
    }
    (tmp_path / "run").mkdir()
    early = CliRunner().invoke(train, merge)
    assert early.exit_code == 1 and "only a finished run" in early.output
    run.start(config.load("sft", None, settings))
    done = CliRunner().invoke(train, merge)
    assert done.exit_code == 0, done.output
    merged, adapted = logits(tmp_path / "merged"), logits(checkpoint, tmp_path / "run" / "adapter")
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (merged - logits(checkpoint)).abs().max() > 0.1


def test_another_base_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"model": str(checkpoint)}))
    (adapter / "manifest.json").write_text(json.dumps({"base": {"weight_files": {"model.safetensors": "0" * 64}}}))
    refused = CliRunner().invoke(train, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")])
    assert refused.exit_code == 1 and "not what the run was trained on" in refused.output
    moved = CliRunner().invoke(train, ["merge", str(tmp_path / "run"), "--out", "m", "--model", str(tmp_path)])
    assert moved.exit_code == 1 and "say where the base lies with --model" in moved.output

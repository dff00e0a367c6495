from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from trainer import cli, config
from trainer.errors import ConfigError

NEEDED = {"model": "m", "dataset": ["d.jsonl"], "output_dir": "out"}

OWN = {"grpo": {"reward": ["format", "rewards.py:mine"], "reward_weight": [1, 2]}}


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    return file


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "model: a\ndataset: d.jsonl\noutput-dir: out\nlora_rank: 4\nepochs: 2\n")
    resolved = config.load("sft", file, {"lora_rank": 8})
    assert (resolved.lora_rank, resolved.epochs, resolved.model) == (8, 2, "a")


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path, "model: a\ndataset: d\noutput_dir: o\nlora_ranc: 4\n")
    with pytest.raises(ConfigError, match="unknown key `lora_ranc`, did you mean `lora_rank`"):
        config.load("sft", file, {})


def test_every_fault_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("sft", None, {"model": "m", "output_dir": "o", "lora_rank": 0, "epochs": "many"})
    assert len(str(caught.value).splitlines()) == 3
    assert "`dataset` is needed" in str(caught.value)


def test_the_file_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `gateway train dpo`"):
        config.load("sft", write(tmp_path, "method: dpo\n"), NEEDED)


@pytest.mark.parametrize("method", list(config.CONFIGS))
def test_a_dumped_configuration_reads_back_equal(tmp_path: Path, method: str) -> None:
    resolved = config.load(method, None, NEEDED | {"lora_rank_pattern": {"q_proj": 4}, "seed": 3} | OWN.get(method, {}))
    assert config.reload(write(tmp_path, config.dump(resolved))) == resolved


def test_paths_in_the_record_do_not_depend_on_the_working_directory() -> None:
    resolved = config.load("sft", None, NEEDED)
    assert Path(resolved.dataset[0]).is_absolute() and resolved.output_dir.is_absolute()


def test_dpo_cannot_train_every_parameter() -> None:
    with pytest.raises(ConfigError, match="tuning"):
        config.load("dpo", None, NEEDED | {"tuning": "full"})


def test_early_stopping_needs_evaluations() -> None:
    with pytest.raises(ConfigError, match="needs `eval_dataset` and `eval_every`"):
        config.load("sft", None, NEEDED | {"early_stopping": 2})


def test_flags_of_every_kind_reach_the_configuration() -> None:
    flags = (
        "--model m --dataset a --dataset b --output-dir o --no-packing --lora-rank-pattern .*q_proj=4 --lora-alpha 3"
    )
    result = CliRunner().invoke(
        cli.train, ["sft", *flags.split(), "--template-kwargs", "enable_thinking=false", "--print-config"]
    )
    assert result.exit_code == 0, result.output
    for line in ("packing: false", "  .*q_proj: 4", "lora_alpha: 3.0", "  enable_thinking: false"):
        assert line in result.output.splitlines()


def test_missing_torch_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.train, ["sft", "--model", "m", "--dataset", "d", "--output-dir", "o"])
    assert result.exit_code == 1
    assert "pip install 'tunegate[train]'" in result.output


def test_command_line_and_data_checks_import_no_torch() -> None:
    check = "import sys, trainer.cli, trainer.data; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_example_is_a_configuration_and_its_data_is_always_the_same(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "examples" / "train"
    config.load("sft", folder / "tickets.yaml", {})
    script = tmp_path / "make_data.py"
    script.write_text((folder / "make_data.py").read_text())
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
    rows = {name: (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "eval")}
    assert (len(rows["train"]), len(rows["eval"])) == (384, 96)
    assert not set(rows["train"]) & set(rows["eval"])
    digest = hashlib.sha256("\n".join(rows["train"]).encode()).hexdigest()
    assert digest.startswith("c45f2fa1d5db")


def test_grpo_says_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="a number for each of 2 rewards, 1 given"):
        config.load("grpo", None, NEEDED | OWN["grpo"] | {"reward_weight": [1]})
    with pytest.raises(ConfigError, match=r"`max_completion_tokens` \(256\) leaves no room"):
        config.load("grpo", None, NEEDED | OWN["grpo"] | {"max_length": 256})
    resolved = config.load("grpo", None, NEEDED | OWN["grpo"])
    assert isinstance(resolved, config.GrpoConfig)
    assert resolved.reward[0] == "format" and Path(resolved.reward[1].partition(":")[0]).is_absolute()

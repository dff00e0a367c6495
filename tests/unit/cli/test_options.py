"""Flags, files and their faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from gateway import config
from gateway.cli.serve import serve


def print_config(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(serve, [*arguments, "--print-config"])
    assert result.exit_code == 0, result.output
    return dict(yaml.safe_load(result.output))


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(serve, arguments)
    assert result.exit_code != 0
    return result.output


def test_every_field_is_a_flag_with_help() -> None:
    flags = {parameter.name for parameter in serve.params}
    assert set(config.ServeConfig.model_fields) <= flags
    assert all(field.description for field in config.ServeConfig.model_fields.values())


def test_help_fits_two_screens() -> None:
    result = CliRunner().invoke(serve, ["--help"], terminal_width=120)
    assert len(result.output.splitlines()) <= 80


def test_flag_wins_over_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("backend: sglang\ntp: 2\nmax-model-len: 4096\napi_key: [one, two]\n")
    resolved = print_config("--config", str(file), "--tp", "4")
    assert resolved["backend"] == "sglang" and resolved["tp"] == 4 and resolved["max_model_len"] == 4096
    assert resolved["api_key"] == "***"


def test_backend_flag_changes_nothing_else() -> None:
    first, second = print_config("--backend", "vllm"), print_config("--backend", "lmdeploy")
    assert {key for key in first if first[key] != second[key]} == {"backend"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bakend: vllm", "unknown key `bakend`, did you mean `backend`?"),
        ("zzz: 1", "unknown key `zzz`; known: model"),
        ("tp: two", "`tp`: Input should be a valid integer"),
        ("port: 70000", "`port`: Input should be less than or equal to 65535, given 70000"),
        ("- a list", "must hold `key: value` lines, found a list"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_file_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert message in refused("--config", str(file))


def test_all_faults_at_once(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("bakend: vllm\ntp: 0\n")
    text = refused("--config", str(file))
    assert "bakend" in text and "`tp`" in text


def test_unknown_flag_names_the_nearest() -> None:
    assert "--backend" in refused("--bakend", "vllm")


def test_missing_file_is_named() -> None:
    assert "cannot read --config /no/such.yaml: No such file or directory" in refused("--config", "/no/such.yaml")


def test_public_name_is_the_last_part_of_the_model() -> None:
    assert config.ServeConfig(model="/models/Qwen3-8B/").public_name == "Qwen3-8B"
    assert config.ServeConfig(model="org/name@main").public_name == "name"
    assert config.ServeConfig(model="org/name", model_name="mine").public_name == "mine"


@pytest.mark.parametrize("text", ["api_key: ''", "api_key: [one, ' ']"])
def test_an_empty_key_is_no_key(tmp_path: Path, text: str) -> None:
    """`--api-key "$KEY"` with KEY unset must not open the gateway to an empty key."""
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert "a key is empty" in refused("--config", str(file))
    assert "a key is empty" in refused("--api-key", "")


def test_keys_are_one_or_many_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("api_key: |\n  sk-secret\n")
    assert config.load(file, {}).api_key == ("sk-secret",)
    file.write_text("api_key: {sk-secret: 1}")
    assert "sk-secret" not in refused("--config", str(file))

"""What `--model` may name, and how the demo model is made."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from backends import envs
from backends.base import BackendError
from backends.progress import Silent
from gateway import demo, models
from gateway.config import home
from gateway.models import ModelError, ModelNotHere


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $TUNEGATE_HOME, and no hub client unless a test brings one."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    return tmp_path / "home" / "models"


def checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_text("{}")
    (path / "model.safetensors").touch()
    return path


def test_engines_and_models_share_one_home() -> None:
    assert envs.engines_dir().parent == home()


def test_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert models.resolve(str(path)) == models.resolve("mine") == models.resolve("./mine") == path


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError) as told:
        models.resolve(str(tmp_path / "empty"))
    for part in ("config.json is missing", r"no weights (*.safetensors)", "no tokenizer"):
        assert part in str(told.value)


def test_sharded_weights_must_be_whole(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "sharded")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "one.safetensors").touch()
    with pytest.raises(ModelError, match=r"served: two\.safetensors is missing$"):
        models.resolve(str(path))


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}'])
def test_damaged_index_is_told(tmp_path: Path, text: str) -> None:
    path = checkpoint(tmp_path / "sharded")
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        models.resolve(str(path))


def test_damaged_config_is_told(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "damaged")
    (path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        models.resolve(str(path))


def test_adapter_in_the_place_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="it holds an adapter; serve its base"):
        models.resolve(str(tmp_path))


def test_gguf_alone(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="GGUF file is not enough"):
        models.resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "a/b/c", "org/name@"])
def test_neither_directory_nor_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match="neither a directory here, nor a hub id"):
        models.resolve(name)


def test_hub_id_without_the_hub_client() -> None:
    with pytest.raises(ModelError, match=re.escape("pip install 'tunegate[hub]'")):
        models.resolve("org/name")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub client, with an empty cache and no network."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(models, "find_spec", importlib.util.find_spec)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub_cache: Path, commit: str) -> Path:
    """A model `org/name` in the hub client's cache, its branch main at `commit`."""
    (hub_cache / "models--org--name" / "refs").mkdir(parents=True)
    (hub_cache / "models--org--name" / "refs" / "main").write_text(commit)
    return checkpoint(hub_cache / "models--org--name" / "snapshots" / commit)


def test_hub_id_found_without_the_network(hub_cache: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    path = cached(hub_cache, commit)
    assert models.resolve("org/name") == models.resolve(f"org/name@{commit}") == path


def test_hub_id_that_was_not_brought(hub_cache: Path) -> None:
    with pytest.raises(ModelNotHere, match=r"Run: gateway models pull org/other@v1"):
        models.resolve("org/other@v1")


def test_hub_that_cannot_be_reached(hub_cache: Path) -> None:
    with pytest.raises(ModelError, match="org/other could not be brought, the hub was not reached"):
        models.ensure("org/other")


def test_list_names_the_demo_and_what_the_hub_client_has(hub_cache: Path, store: Path) -> None:
    assert models.list_models() == []
    checkpoint(store / "demo")
    cached(hub_cache, "0123456789abcdef0123456789abcdef01234567")
    assert [(model.name, model.path.name[:6]) for model in models.list_models()] == [
        ("demo", "demo"),
        ("org/name", "012345"),
    ]


# The demo model


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package index hands out a file that is as expected; converting it is a plain copy."""

    def fake_uv(arguments: list[str], *_: object, **__: object) -> None:
        gguf = Path(arguments[arguments.index("--target") + 1]) / demo._GGUF
        gguf.parent.mkdir(parents=True)
        gguf.write_text("weights")

    monkeypatch.setattr(demo.uv, "run", fake_uv)
    monkeypatch.setattr(demo, "_GGUF_SHA256", "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c")
    monkeypatch.setattr(demo, "_python_with_torch", lambda: Path(sys.executable))


def convert_with(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "convert.py"
    script.write_text("import pathlib, sys\nout = pathlib.Path(sys.argv[2])\nout.mkdir()\n" + code)
    monkeypatch.setattr(demo, "_CONVERT", script)


def test_demo_is_not_here_yet() -> None:
    with pytest.raises(ModelNotHere, match="Run: gateway models pull demo"):
        models.resolve("demo")


def test_demo_needs_an_engine() -> None:
    with pytest.raises(BackendError, match="Run: gateway engines install vllm"):
        models.ensure("demo")


def test_demo_is_made_once(package: None, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = "for name in ('config.json', 'tokenizer.json', 'model.safetensors'): (out / name).write_text('{}')\n"
    convert_with(files, tmp_path, monkeypatch)
    assert models.ensure("demo") == store / "demo"
    assert [path.name for path in store.iterdir() if path.is_dir()] == ["demo"]
    monkeypatch.setattr(demo.uv, "run", None)
    assert models.pull("demo") == store / "demo"


def test_failed_conversion_leaves_nothing(
    package: None, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_with("sys.exit('not right: 3 tensors')", tmp_path, monkeypatch)
    with pytest.raises(demo.DemoFailed, match="not right: 3 tensors"):
        models.ensure("demo")
    assert [path for path in store.iterdir() if path.is_dir()] == []


def test_killed_conversion_is_cleared_away(
    package: None, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(store / ".demo-killed" / "model")
    convert_with("(out / 'config.json').touch()\n", tmp_path, monkeypatch)
    demo.make(store / "demo", Silent())
    assert [path.name for path in store.iterdir() if path.is_dir()] == ["demo"]


def test_other_weights_than_expected_are_refused(package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(demo.DemoFailed, match="expected 0000"):
        models.ensure("demo")

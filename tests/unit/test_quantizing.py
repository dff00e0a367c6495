"""`--quantization awq|gptq` of a plain checkpoint: made once, by a Python with torch (a script here), then found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from backends.base import UnsupportedSpec
from gateway import models, preflight, quantizing
from gateway.config import ConfigError, ServeConfig
from gateway.control import wiring
from quant.config import Grid
from tests.support.quantized import write_checkpoint, write_plain

_PYTHON = """#!{python}
import pathlib, sys
if sys.argv[1] == "-c":
    print("{missing}")
    sys.exit(bool("{missing}"))
given = dict(zip(sys.argv[3::2], sys.argv[4::2]))
pathlib.Path("{log}").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if {works}:
    sys.path.insert(0, "{root}")
    from quant.config import Grid
    from tests.support.quantized import write_checkpoint
    out = pathlib.Path(given["--out"])
    write_checkpoint(out, given["--format"], Grid(group_size=128, symmetric=given["--format"] == "gptq"))
    (out / "tokenizer.json").write_text("{{}}")
    (out / "quant_report.json").write_text("{{}}")
sys.exit(0 if {works} else 3)
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models, "find_spec", lambda name: None)  # no hub client
    return tmp_path / "home"


def python(tmp_path: Path, missing: str = "", works: bool = True) -> Path:
    script = tmp_path / "python"
    script.write_text(
        _PYTHON.format(python=sys.executable, missing=missing, works=works, log=tmp_path / "log", root=ROOT)
    )
    script.chmod(0o755)
    return script


def config(model: Path, tmp_path: Path, **changes: object) -> ServeConfig:
    given = {"model": str(model), "quantization": "awq", "engine_version": "emulator", "device": "cpu"}
    return ServeConfig.model_validate(given | {"trainer_python": tmp_path / "python"} | changes)


def test_it_is_made_once_served_from_the_store_and_listed(home: Path, tmp_path: Path) -> None:
    python(tmp_path)
    served = config(write_plain(tmp_path / "llama"), tmp_path)
    preflight.check(served)
    spec = preflight.engine_spec(served)
    assert spec.model_path.parent == home / "models"
    assert spec.model_path.name.startswith("llama-awq-")
    assert spec.quantization is None
    assert served.public_name == "llama"
    preflight.check(served)
    (call,) = (tmp_path / "log").read_text().splitlines()
    assert call.startswith(f"-m quant --model {tmp_path / 'llama'} --out {spec.model_path} --method awq")
    assert str(spec.model_path) in {model.name for model in models.list_models()}


def test_other_weights_are_another_checkpoint(home: Path, tmp_path: Path) -> None:
    model = write_plain(tmp_path / "llama")
    first = quantizing.recipe(config(model, tmp_path), model)
    write_plain(model, {"model.layers.0.q_proj": (256, 128)})
    second = quantizing.recipe(config(model, tmp_path), model)
    assert first is not None and second is not None
    assert first.target != second.target


@pytest.mark.parametrize("quantization", [None, "fp8", "compressed-tensors"])
def test_every_other_value_is_the_engines(quantization: str | None, home: Path, tmp_path: Path) -> None:
    model = write_plain(tmp_path / "llama")
    assert quantizing.recipe(config(model, tmp_path, quantization=quantization), model) is None


def test_a_quantized_checkpoint_is_served_as_it_is(home: Path, tmp_path: Path) -> None:
    python(tmp_path)
    preflight.check(config(write_plain(tmp_path / "llama"), tmp_path))
    (made,) = (home / "models").iterdir()
    assert preflight.engine_spec(config(made, tmp_path)).model_path == made


def test_an_engine_that_would_not_load_it_is_refused_before_minutes_of_work(home: Path, tmp_path: Path) -> None:
    python(tmp_path)
    model = write_plain(tmp_path / "demo-like", {"model.layers.0.q_proj": (576, 576)})
    with pytest.raises(UnsupportedSpec, match="group_size is 64, allowed: 128"):
        preflight.check(config(model, tmp_path, backend="lmdeploy"))
    assert not (tmp_path / "log").exists()


def test_a_switch_of_engines_asks_too(home: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "awq64", "awq", Grid(group_size=64))
    (model / "tokenizer.json").write_text("{}")
    place = wiring.Place(tmp_path, tmp_path, 1, 1.0)
    wiring._make(place, config(model, tmp_path, quantization=None), [0])
    with pytest.raises(UnsupportedSpec, match="lmdeploy-turbomind on cuda does not load"):
        wiring._make(place, config(model, tmp_path, quantization=None, backend="lmdeploy"), [0])


def test_a_python_without_torch_says_what_to_install(home: Path, tmp_path: Path) -> None:
    python(tmp_path, missing="torch")
    with pytest.raises(ConfigError, match=r"lacks torch: install `tunegate\[quant\]` there.*--trainer-python"):
        preflight.check(config(write_plain(tmp_path / "llama"), tmp_path))
    with pytest.raises(ConfigError, match="does not run"):
        preflight.check(config(tmp_path / "llama", tmp_path, trainer_python=tmp_path / "absent"))


def test_a_quantizer_that_fails_stops_the_start(home: Path, tmp_path: Path) -> None:
    python(tmp_path, works=False)
    with pytest.raises(ConfigError, match=r"was not quantized \(status 3.*goes on with what is finished"):
        preflight.check(config(write_plain(tmp_path / "llama"), tmp_path))

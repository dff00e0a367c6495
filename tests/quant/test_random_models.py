"""The GPU suite's random checkpoints are in the layouts that engines load, and are made once."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402

from quant.config import Format  # noqa: E402
from quant.formats import read_scheme  # noqa: E402
from quant.pack import unpack  # noqa: E402
from scripts.gpu_suite.random_models import adapters, made_once, random_model  # noqa: E402


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A model's directory as far as random weights need one."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {f"Ġ{first}{second}word": n for n, (first, second) in enumerate(zip("abcdefgh", "hgfedcba", strict=True))}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64}))
    return folder


@pytest.mark.parametrize("form", ["awq", "gptq"])
def test_packed_weights_open_as_any_checkpoint_of_the_form(tokenizer: Path, tmp_path: Path, form: Format) -> None:
    random_model("tiny", tokenizer, tmp_path / form, form)
    config = json.loads((tmp_path / form / "config.json").read_text())
    scheme = read_scheme(config["quantization_config"])
    index = json.loads((tmp_path / form / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.down_proj"
    with safe_open(tmp_path / form / index[f"{name}.qweight"], "pt") as file:
        tensors = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in file.keys() if key.startswith(name)}  # noqa: SIM118
    linear = unpack(tensors, form, scheme.grid)
    assert linear.q_NK.shape == (256, 512) and len(linear.q_NK.unique()) == 16
    assert linear.is_symmetric == (form == "gptq")
    assert 0.01 < linear.dequantize(torch.float32).std() < 0.04


def test_the_second_who_asks_waits_and_finds_it(tmp_path: Path) -> None:
    made: list[str] = []
    begun = threading.Event()

    def make(name: str) -> None:
        with made_once(tmp_path / "thing") as folder:
            begun.set()
            if folder is not None:
                (folder / "file").write_text(name)
                made.append(name)

    first = threading.Thread(target=make, args=("first",))
    first.start()
    assert begun.wait(10)
    make("second")
    first.join(10)
    assert made == ["first"] and (tmp_path / "thing" / "file").read_text() == "first"


def test_what_broke_off_is_made_anew(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), made_once(tmp_path / "thing") as folder:
        assert folder is not None
        (folder / "half").touch()
        raise OSError("disk full")
    assert not (tmp_path / "thing").exists()
    with made_once(tmp_path / "thing") as folder:
        assert folder is not None and not list(folder.iterdir())


def test_a_few_adapters_are_on_all_linears_and_the_rest_on_two(tokenizer: Path, tmp_path: Path) -> None:
    random_model("tiny", tokenizer, tmp_path / "base")
    adapters(tmp_path / "base", tmp_path / "lora", 10, rank=2)
    targets = [
        json.loads((tmp_path / "lora" / f"a{number:02}" / "adapter_config.json").read_text())["target_modules"]
        for number in range(10)
    ]
    assert [len(modules) for modules in targets] == [7] * 8 + [2] * 2

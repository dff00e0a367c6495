"""What the gateway makes of peft's adapters, with peft as the judge: equal logits, and equal merged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch")
peft = pytest.importorskip("peft", reason="needs peft")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from gateway.adapters.canonical import canonicalise  # noqa: E402
from gateway.adapters.golden import read_reference  # noqa: E402
from gateway.adapters.manifest import parse_config  # noqa: E402
from gateway.adapters.merge import MergeError, merge  # noqa: E402
from gateway.adapters.shapes import check_fit, read_base  # noqa: E402
from gateway.errors import InvalidRequest  # noqa: E402
from trainer.cli import train  # noqa: E402

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3, r".*layers\.1\.mlp\.up_proj": 40}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 12}},
    "all of them": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3, "k_proj": 5},
        "alpha_pattern": {"k_proj": 1.5, "o_proj": 24},
    },
}
# One rounding of B, relative; in float32 the logits themselves are good to about 1e-6.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
INPUT = torch.arange(3, 40)[None]


def make_adapter(base: Path, directory: Path, dtype: Any, **config: Any) -> Path:
    """An adapter whose B is not zero, saved by peft in a dtype."""
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(load(base), peft.LoraConfig(**settings | config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    path = directory / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    return directory


def load(base: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


@torch.no_grad()
def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    model = load(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    found: torch.Tensor = model.eval()(INPUT).logits
    return found


def canonical(adapter: Path, base: Path) -> Path:
    """A copy of an adapter as the gateway would keep it."""
    copy = adapter.with_name(adapter.name + "-canonical")
    shutil.copytree(adapter, copy)
    config_file, weights = copy / "adapter_config.json", copy / "adapter_model.safetensors"
    config = parse_config(config_file)
    check_fit(weights, config, read_base(base, "base"))
    canonicalise(config_file, weights, config, limit_bytes=1 << 30)
    values = json.loads(config_file.read_text())
    assert (values["use_rslora"], values["rank_pattern"], values["alpha_pattern"]) == (False, {}, {})
    return copy


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.bfloat16) for kind in KINDS), ("all of them", torch.float32)], ids=str
)
def test_logits_are_the_originals(checkpoint: Path, tmp_path: Path, kind: str, dtype: Any) -> None:
    adapter = make_adapter(checkpoint, tmp_path / "adapter", dtype, **KINDS[kind])
    original = logits(checkpoint, adapter)
    effect = (original - logits(checkpoint)).abs().max()
    error = (logits(checkpoint, canonical(adapter, checkpoint)) - original).abs().max()
    assert effect > 0.05  # the adapter matters, or nothing is shown
    assert error <= 4 * TOLERANCE[dtype] * effect  # two layers carry a rounding on


@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_converted_is_exact(checkpoint: Path, tmp_path: Path, init: str) -> None:
    """They change the base; saved converted they are a plain LoRA of twice the rank. Unconverted they are refused."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(load(checkpoint), peft.LoraConfig(init_lora_weights=init, **settings))
    model.peft_config["default"].init_lora_weights = True  # or the untouched start would be computed anew
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    with torch.no_grad():
        trained = model.eval()(INPUT).logits
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(InvalidRequest, match="path_initial_model_for_weight_conversion"):
        parse_config(tmp_path / "raw" / "adapter_config.json")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    found = logits(checkpoint, canonical(tmp_path / "converted", checkpoint))
    assert (trained - logits(checkpoint)).abs().max() > 0.05
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("rslora", torch.bfloat16), *((kind, dtype) for kind in ("all of them", "dora") for dtype in TOLERANCE)],
    ids=str,
)
def test_merged_weights_are_pefts_within_one_rounding(checkpoint: Path, tmp_path: Path, kind: str, dtype: Any) -> None:
    config = {"use_dora": True} if kind == "dora" else KINDS[kind]
    adapter = make_adapter(checkpoint, tmp_path / "adapter", torch.float32, **config)
    base = tmp_path / "base"
    load(checkpoint, dtype).save_pretrained(base, max_shard_size="100KB")
    shutil.copyfile(checkpoint / "tokenizer.json", base / "tokenizer.json")
    (base / "pytorch_model.bin").write_bytes(b"weights of the base in another format")
    merged = merge(adapter, base, tmp_path / "merged")
    assert merged.weights == 14 and len(list(base.glob("*.safetensors"))) > 1
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    theirs = peft.PeftModel.from_pretrained(load(base, dtype), adapter).merge_and_unload().state_dict()
    ours = load(tmp_path / "merged", dtype).state_dict()
    for name, value in theirs.items():
        # Theirs is computed in float32, whose own error shows where the sum is small or not rounded any more.
        allowed = torch.finfo(dtype).eps * value.abs() + 3e-7
        assert ((ours[name] - value).abs() <= allowed).all(), name


def test_whole_modules_take_the_bases_place(checkpoint: Path, tmp_path: Path) -> None:
    adapter = make_adapter(
        checkpoint, tmp_path / "adapter", torch.float32, target_modules=["q_proj"], modules_to_save=["down_proj"]
    )
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    whole = {name: torch.full_like(value, 0.5) for name, value in tensors.items() if "lora_" not in name}
    assert len(whole) == 2
    save_file(tensors | whole, path)
    merge(adapter, checkpoint, tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(load(checkpoint), adapter).merge_and_unload()
    for name, value in load(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_what_cannot_be_merged_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    adapter = make_adapter(checkpoint, tmp_path / "adapter", torch.float32)
    quantized = tmp_path / "quantized"
    shutil.copytree(checkpoint, quantized)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(MergeError, match="is quantized"):
        merge(adapter, quantized, tmp_path / "out")
    raw = tmp_path / "pissa"
    shutil.copytree(adapter, raw)
    values = json.loads((raw / "adapter_config.json").read_text())
    (raw / "adapter_config.json").write_text(json.dumps(values | {"init_lora_weights": "pissa"}))
    with pytest.raises(MergeError, match="pissa"):
        merge(raw, checkpoint, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(MergeError, match="exists"):
        merge(adapter, checkpoint, tmp_path / "there")
    with pytest.raises(MergeError, match="not there"):
        merge(tmp_path / "nothing", checkpoint, tmp_path / "out")
    before = {path.name for path in tmp_path.iterdir()}
    path = adapter / "adapter_model.safetensors"
    save_file({name: value[..., :-1].contiguous() for name, value in load_file(path).items()}, path)
    with pytest.raises(MergeError, match="needs"):
        merge(adapter, checkpoint, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_goldens_for_an_adapter_from_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    adapter = make_adapter(checkpoint, tmp_path / "adapter", torch.float32, **KINDS["all of them"])
    (adapter / "manifest.json").write_text('{"mine": 1}')
    command = [
        "golden",
        "--model",
        str(checkpoint),
        "--adapter",
        str(adapter),
        "--prompt",
        "hello",
        "--prompt",
        "world",
    ]
    result = CliRunner().invoke(train, command)
    assert result.exit_code == 0, result.output
    reference = read_reference(adapter)
    assert (len(reference.goldens), reference.dtype) == (2, "float32")
    assert json.loads((adapter / "manifest.json").read_text())["mine"] == 1
    model = peft.PeftModel.from_pretrained(load(checkpoint), adapter).eval()
    for golden in reference.goldens:
        ids = torch.tensor([[*golden.prompt_token_ids, *golden.token_ids]])
        with torch.no_grad():
            theirs = scores(model, ids)[-len(golden.token_ids) :]
            with model.disable_adapter():
                base = scores(model, ids)[-len(golden.token_ids) :]
        torch.testing.assert_close(torch.tensor(golden.logprobs), theirs, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(golden.base_logprobs), base, rtol=0, atol=1e-4)


def scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found

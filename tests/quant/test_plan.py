"""Structure is found and proved by running the layer, for every family alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from quant.checkpoint import Checkpoint  # noqa: E402
from quant.plan import LayerPlan, make_plan  # noqa: E402
from quant.skeleton import Skeleton  # noqa: E402

from .conftest import FAMILIES  # noqa: E402

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_NORM = {"gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm"}


def plan_of(directory: Path, index: int = 0) -> LayerPlan:
    skeleton = Skeleton(Checkpoint(directory), torch.device("cpu"))
    hidden_BTH = skeleton.embed(torch.arange(3, 27).unsqueeze(0))
    with skeleton.loaded(index, skeleton.checkpoint.weights(skeleton.layer_prefix(index))) as layer:
        return make_plan(layer, hidden_BTH, *skeleton.arguments(index, hidden_BTH))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_and_folds(family: str, model_of: Callable[[str], Path]) -> None:
    plan = plan_of(model_of(family))
    assert QKV in {group.linears for group in plan.groups}
    assert plan.last_site == (None if family == "qwen3_moe" else "mlp.down_proj")
    folds = {(fold.kind, fold.producer): fold for fold in plan.folds}
    gain = "gain-minus-one" if family.startswith("gemma") else "gain"
    assert folds[gain, "input_layernorm"].consumers == QKV
    assert folds["rows", "self_attn.v_proj"].consumers == ("self_attn.o_proj",)
    mlp = folds[gain, MLP_NORM.get(family, "post_attention_layernorm")]
    if family == "qwen3_moe":
        assert {"mlp.gate", "mlp.experts.0.gate_proj", "mlp.experts.7.up_proj"} <= set(mlp.consumers)
        assert folds["rows", "mlp.experts.3.up_proj"].consumers == ("mlp.experts.3.down_proj",)
    else:
        assert mlp.consumers == ("mlp.gate_proj", "mlp.up_proj")
        assert folds["rows", "mlp.up_proj"].consumers == ("mlp.down_proj",)


def test_query_groups_share_rows_of_the_values(model_of: Callable[[str], Path]) -> None:
    """4 heads of 32 over 2 value heads: heads 0 and 1 read value head 0, heads 2 and 3 value head 1."""
    (fold,) = [fold for fold in plan_of(model_of("llama")).folds if fold.producer == "self_attn.v_proj"]
    assert fold.rows == tuple(list(range(32)) * 2 + list(range(32, 64)) * 2)
    (full,) = [fold for fold in plan_of(model_of("mistral")).folds if fold.producer == "self_attn.v_proj"]
    assert full.rows is None


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_equals_the_whole_model(family: str, model_of: Callable[[str], Path]) -> None:
    """The skeleton, its opened experts included, computes what transformers computes."""
    import transformers

    tokens_BT = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    whole = transformers.AutoModelForCausalLM.from_pretrained(model_of(family), dtype=torch.float32)
    skeleton = Skeleton(Checkpoint(model_of(family)), torch.device("cpu"))
    hidden = skeleton.embed(tokens_BT)
    for index in range(2):
        with skeleton.loaded(index, skeleton.checkpoint.weights(skeleton.layer_prefix(index))) as layer:
            hidden = skeleton.run(layer, index, hidden)
    with torch.no_grad():
        expected = whole(tokens_BT).logits
    torch.testing.assert_close(skeleton.logits(tokens_BT, hidden), expected, rtol=1e-4, atol=1e-4)

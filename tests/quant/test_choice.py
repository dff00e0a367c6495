"""The grid of a checkpoint yet to be made follows from the original's sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.choice import group_size_for, linears_of, planned_facts
from quant.rules import judge
from tests.support.quantized import write_plain


@pytest.mark.parametrize(("inputs", "size"), [((256, 512), 128), ((576, 1536), 64), ((96, 64), 32), ((100, 64), 128)])
def test_the_largest_group_that_divides_all(inputs: tuple[int, int], size: int, tmp_path: Path) -> None:
    sizes = {"model.layers.0.q_proj": (256, inputs[0]), "model.layers.0.mlp.down_proj": (256, inputs[1])}
    directory = write_plain(tmp_path / "m", sizes)
    assert group_size_for(directory) == size
    facts = planned_facts(directory, "awq")
    assert facts.properties["group_size"] == size
    assert facts.linears == {name: own for name, own in sizes.items() if own[1] % size == 0}


def test_neither_embeddings_nor_routers_are_linears_of_a_layer(tmp_path: Path) -> None:
    directory = write_plain(
        tmp_path / "m", {"model.layers.0.mlp.gate": (8, 64), "model.layers.0.mlp.up_proj": (64, 64)}
    )
    assert list(linears_of(directory)) == ["model.layers.0.mlp.up_proj"]


def test_engines_are_judged_before_anything_is_made(tmp_path: Path) -> None:
    directory = write_plain(tmp_path / "m", {"model.layers.0.q_proj": (576, 576)})
    (verdict,) = judge(planned_facts(directory, "awq"), "lmdeploy-turbomind")
    assert "group_size is 64, allowed: 128" in verdict.reasons[0]

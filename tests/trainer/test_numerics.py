"""Packing, chunked losses and adapters against the plain way of computing the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from tests.trainer.models import make_checkpoint  # noqa: E402
from trainer import config, logprobs, losses  # noqa: E402
from trainer.learner import Learner  # noqa: E402
from trainer.lora import LoraSettings, inject  # noqa: E402
from trainer.model import load_base  # noqa: E402
from trainer.objectives import Dpo, Orpo, PerToken, Sft, Simpo  # noqa: E402
from trainer.pack import PackedBatch, pack_sequences, plan  # noqa: E402

CPU = torch.device("cpu")


def make_learner(path: Path, **settings: Any) -> Learner:
    base = load_base(
        config.load("sft", None, {"model": str(path), "dataset": ["d"], "output_dir": "o", "device": "cpu"})
    )
    adapter = inject(
        base.model, LoraSettings(**({"rank": 4, "alpha": 8.0} | settings)), torch.Generator().manual_seed(1)
    )
    for name, parameter in adapter.parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    return Learner(base, adapter, weight_decay=0.0)


def random_sequences(lengths: tuple[int, ...], vocabulary: int = 300) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, vocabulary, n, np.int32), rng.integers(0, 2, n).astype(np.float32)) for n in lengths]


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in learner.parameters.items()}
    learner.optimizer.zero_grad()
    return found


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(10, 60))
def test_a_plan_holds_every_item_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = plan(lengths, budget)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(len(items) == 1 or sum(lengths[i] for i in items) <= budget for items in bins)
    assert bins == plan(lengths, budget)


def test_a_plan_fills_rows_well() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(20, 900, 200)]
    assert len(plan(lengths, 1024)) <= math.ceil(sum(lengths) / 1024) * 1.1


OBJECTIVES = {"sft": Sft(), "dpo": Dpo(0.1, 0.1), "orpo": Orpo(0.1), "simpo": Simpo(2.0, 0.5)}


@pytest.mark.parametrize(
    ("family", "objective"),
    [(family, OBJECTIVES["sft"]) for family in ("llama", "qwen2", "qwen3", "mistral")]
    + [("llama", OBJECTIVES[name]) for name in ("dpo", "orpo", "simpo")],
)
def test_packed_and_unpacked_give_the_same_loss_and_gradients(
    tmp_path: Path, family: str, objective: Sft | PerToken
) -> None:
    learner = make_learner(make_checkpoint(tmp_path / family, family=family))
    sequences = random_sequences((7, 20, 13, 30, 5, 64))
    packed = learner.forward_backward(pack_sequences(sequences, CPU), objective, 10.0)
    packed_gradients = gradients(learner)
    unpacked = [
        learner.forward_backward(pack_sequences(sequences[i : i + 2], CPU), objective, 10.0)["loss"] for i in (0, 2, 4)
    ]
    torch.testing.assert_close(packed["loss"], sum(unpacked), rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(learner).items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_log_probabilities_equal_the_plain_model_s(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path / family, family=family)
    learner = make_learner(path)
    sequences = random_sequences((9, 40, 17))
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    expected = []
    for ids, weights in sequences:
        token_ids = torch.from_numpy(ids).long()
        with torch.no_grad():
            table = plain(token_ids[None]).logits[0, :-1].log_softmax(-1)
        expected.append(table.gather(1, token_ids[1:, None])[:, 0][torch.from_numpy(weights[1:]) > 0])
    assert learner.adapter is not None
    batch = pack_sequences(sequences, CPU)
    torch.testing.assert_close(learner.reference(batch), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_sliding_window_is_kept(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", family="mistral")
    learner = make_learner(path)
    batch = pack_sequences([(np.arange(40, dtype=np.int32), np.ones(40, np.float32))], CPU)
    whole = learner.score(batch)
    learner.base.model.config.sliding_window = 8
    for layer in learner.base.model.base_model.layers:
        layer.self_attn.config.sliding_window = 8
    windowed = learner.score(batch)
    plain = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32, sliding_window=8
    )
    with torch.no_grad():
        table = plain(torch.arange(40)[None]).logits[0, :-1].log_softmax(-1)
    assert learner.adapter is not None
    expected = table.gather(1, torch.arange(1, 40)[:, None])[:, 0]
    torch.testing.assert_close(learner.reference(batch), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, windowed, atol=1e-3)


def head_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, requires_grad=True)
    head = torch.randn(50, 16, requires_grad=True)
    return hidden, head, torch.randint(0, 50, (23,)), torch.rand(23)


@pytest.mark.parametrize("chunk_elements", [1, 50 * 7, 2**26])
def test_chunked_log_probabilities_equal_the_full_matrix(monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk_elements)
    hidden, head, targets, weights = head_problem()
    full = (hidden @ head.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((full.sin() * weights).sum(), (hidden, head), retain_graph=True)
    chunked = logprobs.target_logprobs(hidden, head, targets)
    torch.testing.assert_close(chunked, full)
    for got, want in zip(torch.autograd.grad((chunked.sin() * weights).sum(), (hidden, head)), expected, strict=True):
        torch.testing.assert_close(got, want)
    loss = logprobs.weighted_nll(hidden, head, targets, weights)
    torch.testing.assert_close(loss, -(full * weights).sum())
    expected = torch.autograd.grad(-(full * weights).sum() * 3, (hidden, head))
    for got, want in zip(torch.autograd.grad(loss * 3, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_the_loss_does_not_hold_the_vocabulary_matrix() -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    hidden, head, targets, weights = head_problem()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs.target_logprobs(hidden, head.detach(), targets)
        logprobs.weighted_nll(hidden, head.detach(), targets, weights)
    assert kept and all(
        tensor.numel() < 23 * 50 for tensor in kept if tensor is not None and tensor.shape != head.shape
    )


def test_a_step_with_non_finite_gradients_changes_nothing(checkpoint: Path) -> None:
    learner = make_learner(checkpoint)
    batch = pack_sequences(random_sequences((20, 30)), CPU)
    before = {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}
    learner.forward_backward(batch, Sft(), 10.0)
    next(iter(learner.parameters.values())).grad[0, 0] = math.nan
    assert learner.optim_step(1e-2, 1.0)["skipped"] == 1
    assert all(torch.equal(before[name], parameter) for name, parameter in learner.parameters.items())
    learner.forward_backward(batch, Sft(), 10.0)
    assert learner.optim_step(1e-2, 1.0)["skipped"] == 0
    assert not any(torch.equal(before[name], parameter) for name, parameter in learner.parameters.items())


def test_greedy_accuracy_is_exact(checkpoint: Path) -> None:
    learner = make_learner(checkpoint)
    token_ids = [5, 17, 40]
    for _ in range(4):  # what the model itself would say
        row = pack_sequences(
            [(np.array([*token_ids, 0], np.int32), np.array([0] * len(token_ids) + [1], np.float32))], CPU
        )
        with torch.no_grad():
            token_ids.append(int((learner.base.hidden_KH(row) @ learner.base.head_VH.T).argmax()))
    right = np.array(token_ids, np.int32)
    wrong = right.copy()
    wrong[-1] = (wrong[-1] + 1) % 300
    weights = np.array([0, 0, 0, 1, 1, 1, 1], np.float32)
    sums = learner.evaluate(pack_sequences([(right, weights), (wrong, weights)], CPU), Sft())
    assert (sums["exact_match"], sums["token_accuracy"]) == (1, 7)


def test_dpo_is_log_two_at_the_start_and_falls_with_the_margin() -> None:
    zero = torch.zeros(1)
    assert losses.dpo(zero, zero, zero, zero, beta=0.1).loss_P.item() == pytest.approx(math.log(2))
    pair = losses.dpo(torch.tensor([5.0]), zero, zero, torch.tensor([5.0]), beta=0.1, label_smoothing=0.2)
    assert pair.loss_P.item() == pytest.approx(0.8 * math.log1p(math.exp(-1)) + 0.2 * math.log1p(math.exp(1)))
    assert (pair.chosen_reward_P.item(), pair.rejected_reward_P.item()) == pytest.approx((0.5, -0.5))


def test_orpo_and_simpo_follow_their_formulas() -> None:
    chosen, rejected = math.log(0.6), math.log(0.2)
    odds = (0.6 / 0.4) / (0.2 / 0.8)
    got = losses.orpo(torch.tensor([chosen]), torch.tensor([rejected]), beta=0.3).loss_P.item()
    assert got == pytest.approx(-chosen + 0.3 * math.log1p(1 / odds), rel=1e-5)
    got = losses.simpo(torch.tensor([chosen]), torch.tensor([rejected]), beta=2.0, gamma=0.5).loss_P.item()
    assert got == pytest.approx(math.log1p(math.exp(-(2 * (chosen - rejected) - 0.5))), rel=1e-5)


def test_orpo_stays_finite_for_a_certain_answer() -> None:
    sure = torch.zeros(1, requires_grad=True)
    loss = losses.orpo(sure, torch.tensor([-5.0]), beta=0.1).loss_P.sum()
    loss.backward()
    assert loss.isfinite() and sure.grad is not None and sure.grad.isfinite().all()


def test_a_row_sums_by_sequence() -> None:
    batch: PackedBatch = pack_sequences(
        [
            (np.arange(4, dtype=np.int32), np.ones(4, np.float32)),
            (np.arange(3, dtype=np.int32), np.ones(3, np.float32)),
        ],
        CPU,
    )
    assert batch.tokens == 5
    assert batch.sum_by_sequence(torch.ones(5)).tolist() == [3, 2]
    assert batch.positions_1T.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.targets_K.tolist() == [1, 2, 3, 1, 2]

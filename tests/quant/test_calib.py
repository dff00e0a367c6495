"""Calibration sequences: bundled, from texts, from chats through the model's own template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from quant.calib import calibration_tokens, cut, read_records  # noqa: E402
from quant.errors import BadCalibration, BadCheckpoint  # noqa: E402
from quant.evaluate import evaluation_tokens  # noqa: E402


def test_bundled_texts_are_enough_and_reproducible(model_of: Callable[[str], Path]) -> None:
    first = calibration_tokens(model_of("llama"), None, 128, 512, seed=0)
    assert first.shape == (128, 512)
    assert torch.equal(first, calibration_tokens(model_of("llama"), None, 128, 512, seed=0))
    assert not torch.equal(first, calibration_tokens(model_of("llama"), None, 128, 512, seed=1))
    assert sum(len(record["text"]) for record in read_records(None)) > 300_000


def test_chats_go_through_the_models_template(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    import transformers

    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    tokens = calibration_tokens(model_of("llama"), tmp_path / "c.jsonl", 4, 100, seed=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_of("llama"))
    assert tokens.shape[0] == 1
    assert tokenizer.decode(tokens[0]) == "<s>user: hi</s>"


def test_a_log_of_requests_is_calibration_text_too(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps({"custom_id": "1", "url": "/v1/chat/completions", "body": body}))
    (record,) = read_records(tmp_path / "c.jsonl")
    assert record == body


def test_sequences_are_equal_disjoint_and_whole() -> None:
    assert cut(list(range(25)), samples=9, length_tokens=8).flatten().tolist() == list(range(24))
    assert cut(list(range(25)), samples=2, length_tokens=8).tolist() == [list(range(8)), list(range(8, 16))]
    assert cut(list(range(5)), samples=2, length_tokens=8).tolist() == [list(range(5))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{broken\n", "line 1 is not JSON"),
        (b"\n\xff\xfe\n", "line 2 is not JSON"),
        (b'{"prompt": "x"}\n', "line 1: expected"),
        (b'{"text": 5}\n', "line 1: expected"),
        (b'{"messages": 5}\n', "does not go through the model's chat template .*: 5"),
        (b'{"messages": []}\n', "does not go through the model's chat template"),
        (b"\n", "holds 0 tokens"),
    ],
)
def test_unusable_files_say_where(
    content: bytes, message: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(BadCalibration, match=message):
        calibration_tokens(model_of("llama"), tmp_path / "c.jsonl", 4, 8, seed=0)


def test_texts_to_evaluate_on_need_a_tokenizer_and_words(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"words")
    with pytest.raises(BadCheckpoint, match="holds no tokenizer"):
        evaluation_tokens(tmp_path, text, 1, 8)
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(BadCalibration, match="is not plain text"):
        evaluation_tokens(model_of("llama"), text, 1, 8)

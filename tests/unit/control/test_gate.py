"""The golden gate's judgement, and which tolerance holds."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, cast

import pytest

from backends.base import Backend, EngineBusy
from gateway.adapters.golden import Golden, Reference, read_reference
from gateway.control import gate as module
from gateway.control.gate import Asked, Gate, judge, precision
from gateway.errors import InvalidRequest

GOLDENS = (
    Golden([1, 2], [7, 8, 9], [-0.1, -0.2, -0.3], base_logprobs=[-4.0, -5.0, -0.3]),
    Golden([3], [4], [-1.0], base_logprobs=[-2.0]),
)


def test_what_the_trainer_saw_passes() -> None:
    verdict = judge(GOLDENS, [[-0.11, -0.2, -0.28], [-1.0]], tolerance=0.1)
    assert verdict.passed
    assert verdict.text == "2 golden prompts, 4 tokens: logprobs differ by 0.0200 at most, tolerance 0.1"


def test_one_token_off_is_named() -> None:
    verdict = judge(GOLDENS, [[-0.1, -3.21, -0.3], [-1.0]], tolerance=0.1)
    assert not verdict.passed
    assert verdict.text == (
        "golden prompt 1: logprob of token 2 is -3.21, reference -0.20, tolerance 0.1; "
        "of 2 golden prompts, 4 tokens, 1 differ by more, and all by 0.75 on average"
    )


def test_an_ignored_adapter_is_called_so() -> None:
    verdict = judge(GOLDENS, [[-4.02, -4.99, -0.31], [-2.0]], tolerance=0.1)
    assert not verdict.passed
    assert "these are the base model's own logprobs: the adapter is ignored" in verdict.text


def test_first_tokens_alone_are_judged_too() -> None:
    verdict = judge(GOLDENS, [[-4.0, -5.0], [-2.0]], tolerance=0.1)
    assert not verdict.passed
    assert verdict.text == (
        "golden prompt 1: logprob of token 2 is -5.00, reference -0.20, tolerance 0.1; of 2 golden prompts, 3 tokens, "
        "3 differ by more, and all by 3.23 on average; these are the base model's own logprobs: the adapter is "
        "ignored, or holds nothing"
    )


def test_a_small_shift_of_all_tokens_fails_too() -> None:
    verdict = judge(GOLDENS, [[-0.16, -0.26, -0.36], [-1.06]], tolerance=0.1)
    assert not verdict.passed and "all by 0.06 on average" in verdict.text


@pytest.mark.parametrize(
    ("dtype", "quantized", "trained", "expected"),
    [
        ("float32", False, "float32", 0.1),
        ("float32", False, "bfloat16", 0.5),
        ("float32", False, "", 0.5),
        ("auto", False, "float32", 0.5),
        ("bfloat16", False, "bfloat16", 0.5),
        ("auto", True, "float32", 1.5),
    ],
)
def test_the_coarser_side_decides(dtype: str, quantized: bool, trained: str, expected: float) -> None:
    assert Gate(precision(dtype, quantized)).tolerance(Reference(GOLDENS, trained)) == expected


def test_the_operator_decides_first() -> None:
    assert Gate("16-bit", 0.02).tolerance(Reference(GOLDENS)) == 0.02
    assert Gate(None, 0.02).tolerance(Reference(GOLDENS)) == 0.02
    assert Gate(None).tolerance(Reference(GOLDENS)) is None


GOOD: dict[str, Any] = {"prompt_token_ids": [1], "token_ids": [2], "logprobs": [-0.5], "text": "x"}


def test_a_trainers_manifest(tmp_path: Path) -> None:
    write(tmp_path, {"golden": [GOOD] * 20, "dtype": "float32", "metrics": {}})
    reference = read_reference(tmp_path)
    assert (len(reference.goldens), reference.dtype) == (8, "float32")
    for other in ({}, {"golden": None}, {"golden": []}):
        write(tmp_path, other)
        assert read_reference(tmp_path) == Reference()
    (tmp_path / "manifest.json").unlink()
    assert read_reference(tmp_path) == Reference()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": []}, "1 to 256"),
        ({"logprobs": []}, "needs its logprob"),
        ({"base_logprobs": [-1, -2]}, "needs its logprob"),
        ({"logprobs": [0.5]}, "at most 0"),
        ({"token_ids": [-1]}, "not negative"),
        ({"token_ids": "x"}, "golden"),
        ({"prompt_token_ids": [1] * 5000}, "1 to 4096"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write(tmp_path, {"golden": [GOOD | change]})
    with pytest.raises(InvalidRequest, match=words):
        read_reference(tmp_path)


async def test_a_manifest_that_cannot_be_read_says_nothing_of_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked again: neither condemned, nor a defect of ours that would end control."""

    def broken(_: Path) -> Reference:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module, "read_reference", broken)
    with pytest.raises(EngineBusy, match=r"golden prompts cannot be read: .*Input/output error"):
        await Gate("16-bit").check(cast(Backend, None), cast(Asked, None), "a-1", tmp_path)


def write(directory: Path, manifest: dict[str, Any]) -> None:
    (directory / "manifest.json").write_text(json.dumps(manifest))

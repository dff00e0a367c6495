"""Our packed words are, bit for bit, those that vLLM's own converters make of the same integers."""

from __future__ import annotations

import os
import subprocess

import pytest

from backends import envs
from tests.engine.conftest import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

_COMPARE = """
import torch
from quant.config import Grid
from quant.pack import QuantizedLinear, pack
from vllm.model_executor.layers.quantization.utils import quant_utils as theirs

generator = torch.Generator().manual_seed(0)
compared = 0
shapes = [(4, True, 64, 128, 32), (4, False, 64, 128, 32), (8, True, 32, 64, 64), (4, True, 8, 576, 64)]
for bits, symmetric, n, k, group_size in [*shapes, (4, False, 1536, 576, 64)]:
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    groups = k // group_size
    q_NK = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    zero_NG = torch.randint(1, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
    if symmetric:
        zero_NG.fill_(grid.middle)
    ours = QuantizedLinear(q_NK, torch.rand(n, groups, generator=generator).half(), zero_NG, grid)
    q_KN, zero_GN = q_NK.t().int(), zero_NG.t().int()
    if symmetric:
        packed = pack(ours, "gptq")
        expected = theirs.gptq_pack(q_KN, bits, k, n), theirs.pack_cols(zero_GN - 1, bits, groups, n)
    else:
        packed = pack(ours, "awq")
        expected = theirs.awq_pack(q_KN, bits, k, n), theirs.awq_pack(zero_GN, bits, groups, n)
    for name, words in zip(("qweight", "qzeros"), expected, strict=True):
        assert torch.equal(packed[name], words), (bits, symmetric, name)
        compared += words.numel()
print(compared, "words are equal")
"""


def test_packed_words_equal_vllms() -> None:
    engine = envs.find("vllm", device="cpu")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "DO_NOT_TRACK": "1"}
    done = subprocess.run([engine.python, "-c", _COMPARE], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout.strip())
    assert done.stdout.endswith("words are equal\n")

"""A few seconds of the soak: the harness itself works, and the shortest of soaks finds nothing wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.proofs.soak.__main__ import Soak, report


async def test_the_shortest_soak(tmp_path: Path) -> None:
    soak = Soak("vllm", tmp_path, argparse.Namespace(minutes=0.1, clients=6, seed=3))
    await soak.run()
    assert soak.tally.wrong == []
    assert soak.lost_slots == []
    assert soak.tally.outcomes["right"] > 0
    assert soak.tally.outcomes["right, streamed"] > 0
    assert sum(soak.faults.values()) > 0
    assert "| **wrong answers** | 0 |" in report([soak], 0.1)

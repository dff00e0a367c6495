"""More adapters than slots, over emulated engines that are killed: `python -m tests.proofs.residency`, small."""

from __future__ import annotations

import argparse

import pytest

from tests.proofs.residency import emulated


def test_nothing_is_lost_or_mixed_when_engines_are_killed(capsys: pytest.CaptureFixture[str]) -> None:
    load = {"clients": 6, "exponent": 1.0, "gap_s": 0.02, "max_tokens": 12, "seconds": 4.0, "kill_every_s": 1.5}
    good = emulated(argparse.Namespace(adapters=40, places=4, replicas=2, **load))
    said = capsys.readouterr().out
    assert good, said
    assert "engines killed: 0" not in said

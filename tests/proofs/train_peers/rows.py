"""How long the conversations are that trainers are compared on."""

from __future__ import annotations

import numpy as np


def answer_words(count: int) -> list[int]:
    """Words of so many answers: 20 to 600, most of them short, always the same."""
    drawn = np.random.default_rng(0).lognormal(np.log(100), 0.8, count)
    return [int(words) for words in np.clip(drawn, 20, 600)]

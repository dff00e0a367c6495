"""Customers' sentences, and the order of each: `python make_data.py` writes data/train.jsonl and data/eval.jsonl."""

from __future__ import annotations

import json
import random
from pathlib import Path

SENTENCES = (
    "Where is my order {}? It should be here by now.",
    "I want to send back order {}, the lamp is broken.",
    "Order {} came without a cable.",
    "Please cancel {}, I ordered twice.",
    "You charged me twice for order {}!",
    "Can {} still go to my new address?",
    "The box of order {} was empty.",
    "I need an invoice for {}, please.",
)
HELD_OUT_SENTENCES = (
    "The shoes in order {} are too small.",
    "Has {} left your warehouse?",
    "Order {} is the wrong blue.",
)
QUESTION = "\n\nWhich order number is this about? Reply with the number only."


def main(directory: Path) -> None:
    numbers = random.Random(0).sample(range(1000, 10000), 120)
    directory.mkdir(exist_ok=True)
    for name, part, sentences in (
        ("train", numbers[:96], SENTENCES),
        ("eval", numbers[96:], HELD_OUT_SENTENCES),
    ):
        rows = [
            {"prompt": sentences[i % len(sentences)].format(number) + QUESTION, "order": str(number)}
            for i, number in enumerate(part)
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(__file__).with_name("data"))

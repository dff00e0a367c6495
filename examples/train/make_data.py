"""Write data/train.jsonl and data/eval.jsonl: support tickets and where they go. The same files every time.

A model not trained on them cannot know the form of the answers: its exact match is near 0 %. No ticket is in both.
"""

import itertools
import json
import random
from pathlib import Path

TEAMS = {
    "billing": ["invoice", "refund", "credit card"],
    "shipping": ["parcel", "delivery", "tracking number"],
    "accounts": ["password", "login", "user name"],
    "repairs": ["screen", "battery", "charger"],
}
URGENCY = {
    "urgent": ["has vanished, help", "failed again and I am furious", "must be fixed today", "is a disaster"],
    "normal": ["looks a bit odd", "raises a small question", "could be better", "seems slow lately"],
}
OPENINGS = ["My", "Hello, my", "Sorry, but the", "Hi! Our", "Good morning, the", "So, my"]
TRAIN, EVAL = 384, 96


def tickets() -> list[dict[str, object]]:
    """Every ticket once, in an order drawn from a fixed seed."""
    rows = []
    for team, urgency in itertools.product(TEAMS, URGENCY):
        for thing, problem, opening in itertools.product(TEAMS[team], URGENCY[urgency], OPENINGS):
            question = {"role": "user", "content": f"Ticket: {opening} {thing} {problem}."}
            rows.append({"messages": [question, {"role": "assistant", "content": f"{team}/{urgency}"}]})
    random.Random(7).shuffle(rows)
    return rows


def main() -> None:
    folder = Path(__file__).parent / "data"
    folder.mkdir(exist_ok=True)
    rows = tickets()
    for name, part in (("train", rows[:TRAIN]), ("eval", rows[TRAIN : TRAIN + EVAL])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{folder.name}/{name}.jsonl: {len(part)} tickets")


if __name__ == "__main__":
    main()

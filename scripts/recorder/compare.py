"""Compare two folders of recordings by shape: `python -m scripts.recorder.compare A B`, a table of what differs.

Statuses, headers that matter, keys and types of bodies, order and kinds of stream events, metrics, options, exits of
failed starts. Values are ignored, but for the `type` and `code` of errors. Exit status 1 when anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HEADERS = ("content-type", "www-authenticate", "allow", "retry-after")
_OWN_FILES = ("log_main",)  # words of a log, of no shape
_OPEN_KEYS = ("top_logprobs", "prompt_logprobs", "loaded_adapters")  # their keys are values
_SHOWN_CHARACTERS = 60
_SHOWN_PLACES = 3
_ABSENT = "-"


@dataclass(frozen=True)
class Difference:
    """One thing that differs at one place (`file/case`), as it is in A and in B."""

    place: str
    what: str
    a: str
    b: str


def compare(a: Path, b: Path) -> list[Difference]:
    """All differences between two folders of recordings of one engine, in the order of files and cases."""
    files = sorted({path.stem for folder in (a, b) for path in folder.glob("*.json")} - set(_OWN_FILES))
    found: list[Difference] = []
    for name in files:
        one, other = (_read(folder / f"{name}.json") for folder in (a, b))
        found += _one_sided(name, "file", one, other) or _files(name, one, other)
    return found


def table(rows: list[Difference]) -> str:
    """The differences for a person: the same difference at many places is one line."""
    places: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        places[row.what, row.a, row.b].append(row.place)
    lines = [("what", "A", "B", "where")]
    for (what, one, other), where in places.items():
        more = len(where) - _SHOWN_PLACES
        shown = ", ".join(where[:_SHOWN_PLACES]) + (f" and {more} more" if more > 0 else "")
        lines.append((what, _short(one), _short(other), shown))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    padded = ["  ".join([*map(str.ljust, line[:3], widths), line[3]]) for line in lines]
    return "\n".join(padded) + f"\n{len(rows)} differences of {len(places)} kinds\n"


def _files(name: str, a: Any, b: Any) -> Iterator[Difference]:
    if "cases" in a and "cases" in b:
        for case in dict.fromkeys([*a["cases"], *b["cases"]]):
            place = f"{name}/{case}"
            one, other = a["cases"].get(case), b["cases"].get(case)
            yield from _one_sided(place, "case", one, other) or _answers(place, one["response"], other["response"])
    elif "flags" in a and "flags" in b:
        known = [{option for flag in side["flags"] for option in flag["names"]} for side in (a, b)]
        yield from _only(name, "options", known[0], known[1])
    elif "exit_code" in a and "exit_code" in b:
        yield from _unlike(name, "exit status", a["exit_code"], b["exit_code"])
    else:
        yield Difference(name, "kind of file", ", ".join(sorted(a)), ", ".join(sorted(b)))


def _answers(place: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    yield from _unlike(place, "status", *(side.get("status", "connection broken") for side in (a, b)))
    for header in _HEADERS:
        yield from _unlike(place, header, *(side.get("headers", {}).get(header, _ABSENT) for side in (a, b)))
    forms = [next((form for form in ("json", "events", "families", "text") if form in side), "none") for side in (a, b)]
    yield from _unlike(place, "kind of body", *forms)
    if forms[0] != forms[1]:
        return
    if forms[0] == "json":
        yield from _shapes(place, "body", a["json"], b["json"])
        if a["status"] >= 400:
            for field in ("type", "code"):
                yield from _unlike(place, f"error's {field}", *(_of_error(side["json"], field) for side in (a, b)))
    elif forms[0] == "events":
        yield from _streams(place, a["events"], b["events"])
    elif forms[0] == "families":
        yield from _metrics(place, a["families"], b["families"])


def _streams(place: str, a: list[Any], b: list[Any]) -> Iterator[Difference]:
    orders = [[kind for kind, _ in itertools.groupby(map(_event_kind, side))] for side in (a, b)]
    yield from _unlike(place, "order of events", *(" > ".join(order) for order in orders))
    firsts = [{_event_kind(event): event for event in reversed(side)} for side in (a, b)]
    for kind, event in firsts[0].items():
        if kind in firsts[1]:
            yield from _shapes(place, f"event {kind}", event, firsts[1][kind])


def _event_kind(event: Any) -> str:
    """A name for what an event is: its own, or what a chunk brings."""
    if isinstance(event, str):
        return event
    if "event" in event:
        return str(event["event"])
    if "error" in event or event.get("object") == "error":
        return "error"
    choices = event.get("choices")
    if not choices:
        return "usage"
    choice = choices[0]
    brings = [key for key, value in (choice.get("delta") or {"text": choice.get("text")}).items() if value]
    end = ["end"] if choice.get("finish_reason") else []
    return "chunk(" + "+".join([*brings, *end]) + ")"


def _metrics(place: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    yield from _only(place, "metrics", set(a), set(b))
    for name in a:
        if name in b:
            yield from _unlike(place, f"type of {name}", a[name]["type"], b[name]["type"])
            labels = [sorted({label for _, labels in side[name]["samples"] for label in labels}) for side in (a, b)]
            yield from _unlike(place, f"labels of {name}", *(", ".join(side) for side in labels))


def _shapes(place: str, path: str, a: Any, b: Any) -> Iterator[Difference]:
    """Keys and types, at every depth; of a list the first item counts, and null is as good as any plain value."""
    kinds = [_kind(value) for value in (a, b)]
    if isinstance(a, dict) and isinstance(b, dict):
        if path.removesuffix("[]").rpartition(".")[2] in _OPEN_KEYS:
            return
        yield from _only(place, f"keys of {path}", set(a), set(b))
        for key in a:
            if key in b:
                yield from _shapes(place, f"{path}.{key}", a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list):
        if a and b:
            yield from _shapes(place, f"{path}[]", a[0], b[0])
    elif not ("null" in kinds and set(kinds) <= {"null", "text", "number", "truth"}):
        yield from _unlike(place, f"type of {path}", *kinds)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "truth"
    return {int: "number", float: "number", str: "text", list: "list", dict: "object"}[type(value)]


def _of_error(body: Any, field: str) -> Any:
    inner = body.get("error", body) if isinstance(body, dict) else None
    return inner.get(field, _ABSENT) if isinstance(inner, dict) else _ABSENT


def _only(place: str, what: str, a: set[str], b: set[str]) -> Iterator[Difference]:
    if a != b:
        yield Difference(
            place, f"{what} of one alone", *(", ".join(sorted(side)) or _ABSENT for side in (a - b, b - a))
        )


def _unlike(place: str, what: str, a: Any, b: Any) -> Iterator[Difference]:
    if a != b:
        yield Difference(place, what, str(a), str(b))


def _one_sided(place: str, what: str, a: Any, b: Any) -> list[Difference]:
    if a is not None and b is not None:
        return []
    return [Difference(place, what, *("there" if side is not None else _ABSENT for side in (a, b)))]


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _short(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}… ({len(text)} characters)"


def main() -> int:
    """Print the table; exit status 1 when the two differ."""
    parser = argparse.ArgumentParser(prog="python -m scripts.recorder.compare", description=__doc__)
    parser.add_argument("a", type=Path, help="a folder of recordings, such as backends/emulator/recordings/vllm")
    parser.add_argument("b", type=Path)
    options = parser.parse_args()
    for folder in (options.a, options.b):
        if not any(folder.glob("*.json")):
            parser.error(f"{folder} holds no recordings (files NAME.json)")
    rows = compare(options.a, options.b)
    print(f"A: {_heading(options.a)}\nB: {_heading(options.b)}\n{table(rows)}", end="")
    return 1 if rows else 0


def _heading(folder: Path) -> str:
    head = json.loads(min(folder.glob("*.json")).read_text())
    return f"{folder}: {head.get('engine')} {head.get('version')}, {head.get('device')}, {head.get('date')}"


if __name__ == "__main__":
    sys.exit(main())

"""Where rows of data come from, as one text that also stands in configurations:

    FILE                                    JSON lines, plain or .gz; .parquet
    FOLDER[:[SUBSET:]SPLIT]                 files that the package `datasets` reads
    OWNER/NAME[@REVISION][:[SUBSET:]SPLIT]  a data set of the hub; with `hub:` before it where a file has that name

The split is `train` unless another is named. `#N` at the end takes the first N rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

_ROWS = re.compile(r"(?P<rest>.+)#(?P<rows>[1-9]\d*)")
_PART = r"[\w.\-]+"
_SPLIT = rf"(:((?P<subset>{_PART}):)?(?P<split>{_PART}))"
_FOLDER = re.compile(rf"(?P<place>.+?){_SPLIT}")
_HUB = re.compile(rf"(?P<place>{_PART}/{_PART})(@(?P<revision>[\w.\-/]+))?{_SPLIT}?")
_HUB_PREFIX = "hub:"
_FILE_SUFFIXES = frozenset({".jsonl", ".json", ".gz", ".parquet", ".txt", ".csv"})


@dataclass(frozen=True, slots=True)
class Origin:
    """One source of rows."""

    place: str  # absolute path, or OWNER/NAME
    on_hub: bool = False
    revision: str | None = None
    subset: str | None = None
    split: str | None = None
    rows: int | None = None  # the first so many

    @property
    def package(self) -> str | None:
        """The package that reads it; None: it is a file of lines."""
        if self.on_hub or Path(self.place).is_dir():
            return "datasets"
        return "pyarrow" if Path(self.place).suffix == ".parquet" else None

    def name_of_row(self, number: int) -> str:
        """As messages say it: `train.jsonl line 3`."""
        unit = "row" if self.package else "line"
        return f"{self if self.on_hub else Path(self.place).name} {unit} {number}"

    def __str__(self) -> str:
        """What `parse_origin` reads back."""
        revision = f"@{self.revision}" if self.revision else ""
        split = f":{self.subset}" * bool(self.subset) + f":{self.split}" * bool(self.split)
        return f"{_HUB_PREFIX * self.on_hub}{self.place}{revision}{split}" + f"#{self.rows}" * bool(self.rows)


def parse_origin(text: str) -> Origin:
    """Read the text of an origin; paths become absolute. What is no file, no folder and no hub id is a missing file."""
    if _exists(text):
        return Origin(_absolute(text))
    if match := _ROWS.fullmatch(text):
        return replace(parse_origin(match["rest"]), rows=int(match["rows"]))
    if (match := _FOLDER.fullmatch(text)) and Path(match["place"]).expanduser().is_dir():
        return Origin(_absolute(match["place"]), subset=match["subset"], split=match["split"])
    match = _HUB.fullmatch(text.removeprefix(_HUB_PREFIX))
    if match and (text.startswith(_HUB_PREFIX) or Path(match["place"]).suffix not in _FILE_SUFFIXES):
        return Origin(match["place"], True, match["revision"], match["subset"], match["split"])
    return Origin(_absolute(text))


def _exists(text: str) -> bool:
    return Path(text).expanduser().exists()


def _absolute(text: str) -> str:
    return str(Path(text).expanduser().absolute())

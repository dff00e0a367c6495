"""`python -m tests.proofs.data_scale`: checking a million rows takes no more memory than checking a tenth of them.

Files of a hundredth, a tenth and all of the rows are written in each format and checked by `gateway train check-data`,
a process each. Exits with 1 where all the rows take a quarter more memory than a tenth. Parquet needs pyarrow; its
row groups are of 100,000 rows.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ALLOWED_GROWTH = 1.25
_ROW_GROUP = 100_000  # rows, as writers of large files make them
# A process of its own in between: a child counts what the one that started it held until then.
_MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Conversations of two turns, about 450 bytes each."""
    for i in range(count):
        question = {"role": "user", "content": f"Ticket {i}: " + f"the printer of room {i % 977} is out of paper. " * 3}
        answer = {"role": "assistant", "content": f"I have sent paper to room {i % 977}. " * 2}
        thanks = {"role": "user", "content": "Thanks!"}
        yield {"messages": [question, answer, thanks, {"role": "assistant", "content": f"Closed ticket {i}."}]}


def write_lines(file: Path, count: int) -> None:
    """JSON lines, compressed where the name says so."""
    with gzip.open(file, "wt", compresslevel=1) if file.suffix == ".gz" else file.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows(count))


def write_parquet(file: Path, count: int) -> None:
    """The same rows as one column of structs."""
    import pyarrow
    from pyarrow import parquet

    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    schema = pyarrow.schema([("messages", pyarrow.list_(message))])
    waiting = rows(count)
    with parquet.ParquetWriter(file, schema) as writer:
        for first in range(0, count, _ROW_GROUP):
            group = [next(waiting) for _ in range(min(_ROW_GROUP, count - first))]
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


def check(file: Path) -> tuple[float, float, float]:
    """(seconds, seconds of CPU, most memory in MB) of one `check-data`. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-c", _MEASURE, sys.executable, "-m", "trainer", "check-data", str(file)]
    started = time.perf_counter()
    measured = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    seconds = time.perf_counter() - started
    cpu_s, peak_kib = map(float, measured.splitlines()[-1].split())
    return seconds, cpu_s, peak_kib * 1024 / 1e6


def main() -> None:
    """Print a line for each file."""
    parser = argparse.ArgumentParser(prog="tests.proofs.data_scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    most = parser.parse_args().rows
    writers = {".jsonl": write_lines, ".jsonl.gz": write_lines}
    if importlib.util.find_spec("pyarrow"):
        writers[".parquet"] = write_parquet
    grown = []
    with tempfile.TemporaryDirectory() as directory:
        for suffix, write in writers.items():
            peaks = []
            for count in (most // 100, most // 10, most):
                file = Path(directory) / f"{count}{suffix}"
                write(file, count)
                seconds, cpu_s, peak_mb = check(file)
                peaks.append(peak_mb)
                size_mb = file.stat().st_size / 1e6
                print(
                    f"{file.name}: {size_mb:.0f} MB, {seconds:.1f} s ({cpu_s:.1f} s of CPU), {peak_mb:.0f} MB of memory"
                )
                file.unlink()
            grown += [suffix] if peaks[-1] > peaks[-2] * _ALLOWED_GROWTH else []
    if grown:
        raise SystemExit(f"memory grows with the rows of {', '.join(grown)}")


if __name__ == "__main__":
    main()

"""Rows of parquet files, folders and hub data sets, one at a time, through packages of the extra `data`.

Arrow gives every row every key of its column, with null where the row has none: a null key is taken as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import DataError
from trainer.origins import Origin

_BATCH_ROWS = 256
_READ_BYTES = 2**20  # else whole columns of a row group are read at once


def table_lines(origin: Origin) -> Iterator[bytes]:
    """Each row as a line of JSON. Raises DataError."""
    rows = _parquet_rows(Path(origin.place)) if origin.package == "pyarrow" else _dataset_rows(origin)
    for row in rows:
        yield json.dumps(_without_nulls(row), ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False) as table:
            for batch in table.iter_batches(_BATCH_ROWS, use_threads=False):
                yield from batch.to_pylist()
    except (OSError, ValueError, OverflowError, ArrowException) as error:  # texts and times that Python does not have
        raise DataError(f"cannot read {file}: {error}") from error


def _dataset_rows(origin: Origin) -> Iterator[dict[str, Any]]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(
            origin.place, origin.subset, split=origin.split or "train", revision=origin.revision, streaming=True
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        nowhere = " (there is no such file or folder either)" if origin.on_hub else ""
        raise DataError(f"cannot read {origin}{nowhere}: {error}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value

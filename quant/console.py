"""What the commands share: errors in one line, and the question whether torch is here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from quant.errors import QuantError


class user_errors:
    """Turns the failures a user can mend into one line: QuantError and errors of the disk."""

    def __init__(self, out: Path | None = None) -> None:
        self._out = out  # where unfinished work would be

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, QuantError):
            raise click.ClickException(str(error)) from error
        if isinstance(error, OSError):
            hint = (
                f"; finished shards are kept in {self._out}.partial: repeat the command to go on" if self._out else ""
            )
            raise click.ClickException(f"{error}{hint}") from error


def need_torch() -> None:
    """Raises ClickException, saying what to install."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"this needs {' and '.join(missing)}: pip install 'tunegate[quant]'")

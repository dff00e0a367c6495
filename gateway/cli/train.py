"""`gateway train`: the trainer's commands, and the one that takes the gateway's own merge."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

import click
import msgspec

from gateway.adapters.merge import MergeError, merge
from trainer.cli import train


class _Run(msgspec.Struct):
    """Of run.json."""

    model: str


class _Base(msgspec.Struct):
    weight_files: dict[str, str]  # name -> SHA-256


class _Manifest(msgspec.Struct):
    """Of manifest.json."""

    base: _Base


_Record = TypeVar("_Record", _Run, _Manifest)


@train.command("merge")
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New directory for the merged checkpoint.")
@click.option(
    "--model", type=click.Path(path_type=Path), help="The base, where it lies elsewhere than when it trained."
)
def merge_run(run_dir: Path, out: Path, model: Path | None) -> None:
    """Write a finished run's result as a whole checkpoint: its base with the adapter in the weights."""
    try:
        base = model or Path(_read(run_dir / "run.json", _Run).model)
        adapter = run_dir / "adapter"
        _check_base(base, _read(adapter / "manifest.json", _Manifest).base.weight_files)
        merged = merge(adapter, base, out)
    except MergeError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{merged.weights} weights changed: {merged.path}")


def _read(file: Path, kind: type[_Record]) -> _Record:
    """What the run wrote down. Raises MergeError."""
    if not file.is_file():
        raise MergeError(
            f"{file} is not there: only a finished run with an adapter can be merged "
            "(the result of --tuning full is a checkpoint already: RUN/model)"
        )
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except msgspec.MsgspecError as error:
        raise MergeError(f"{file} is not as a run leaves it: {error}") from error


def _check_base(base: Path, trained_on: dict[str, str]) -> None:
    """Raises MergeError where the weights are not those that the adapter was trained on."""
    for name, digest in trained_on.items():
        if not (base / name).is_file():
            raise MergeError(f"{base / name} is not there; say where the base lies with --model")
        with (base / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise MergeError(f"{base / name} is not what the run was trained on")

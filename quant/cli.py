"""`gateway quantize …`, also `python -m quant`. Imports torch only when a command needs it."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from quant.choice import group_size_for
from quant.config import (
    DEFAULT_FORMAT,
    FORMATS,
    GROUP_SIZES,
    METHODS,
    Format,
    Grid,
    Method,
    QuantOptions,
    default_symmetric,
)
from quant.console import need_torch, user_errors
from quant.verify_cli import verify

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(invoke_without_command=True)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="rtn",
    show_default=True,
    help="rtn is fast; awq and gptq calibrate.",
)
@click.option("--model", help="Checkpoint directory, hub id, or the name of a pulled model such as `demo`.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to write; must not exist.")
@click.option("--format", "form", type=click.Choice(FORMATS), help="Default: awq; gptq for method gptq.")
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True)
@click.option(
    "--group-size",
    type=click.Choice(["auto", *(str(size) for size in GROUP_SIZES)]),
    default="auto",
    show_default=True,
    help="Inputs that share a scale. auto: the largest that divides all.",
)
@click.option("--symmetric/--asymmetric", default=None, help="Default: as the format asks.")
@click.option("--calib", type=_FILE, help='JSONL of {"messages": [...]} or {"text": "..."}. Default: a bundled set.')
@click.option(
    "--calib-samples", type=click.IntRange(min=0), default=128, show_default=True, help="Sequences; 0: none (rtn only)."
)
@click.option(
    "--calib-tokens", type=click.IntRange(min=8), default=512, show_default=True, help="Tokens of a sequence."
)
@click.option("--skip", multiple=True, metavar="REGEX", help="Linears to leave alone, by name. Repeatable.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.pass_context
def quantize(ctx: click.Context, /, model: str | None, out: Path | None, **flags: Any) -> None:
    """Quantize a checkpoint to 4 bits, or verify and convert one (subcommands)."""
    if ctx.invoked_subcommand is not None:
        return
    if model is None or out is None:
        raise click.UsageError("--model and --out are required; `quantize verify --help` for the subcommands")
    need_torch()
    from quant.ranks import joined
    from quant.walk import quantize_checkpoint, resolve_device

    with user_errors():
        options = _options(find_model(model), **flags)
    with user_errors(out), joined(resolve_device(options.device)) as ranks:
        console = Console(stderr=True, quiet=not ranks.is_first)
        with _progress(console) as progress:
            task = progress.add_task(f"{options.method} {options.format}", total=None, note="calibrating")

            def show(step: Any) -> None:
                note = "resumed" if step.resumed else f"worst error {step.worst_error:.2%}, {step.eta_s:.0f} s left"
                progress.update(task, completed=step.layer, total=step.layers, note=note)
                if not console.is_terminal:  # where the bar is not drawn, in a log
                    console.print(f"layer {step.layer} of {step.layers}: {note}", highlight=False)

            report = quantize_checkpoint(options, out, show, ranks)
    if ranks.is_first:
        _print_summary(report, out, console)


quantize.add_command(verify)


@quantize.command("convert")
@click.argument("directory", type=_DIRECTORY)
@click.option("--format", "form", type=click.Choice(FORMATS), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write; must not exist.")
def convert_command(directory: Path, form: Format, out: Path) -> None:
    """Write a quantized DIRECTORY in another format, exactly: no weight changes, or it is refused."""
    need_torch()
    from quant.convert import convert

    with user_errors(out):
        convert(directory, form, out)
    click.echo(f"wrote {out}")


def find_model(name: str) -> Path:
    """The directory of a model given by path, by the name of a pulled model, or by hub id. Raises ClickException."""
    if Path(name).is_dir():
        return Path(name)
    home = Path(os.environ.get("TUNEGATE_HOME", "~/.tunegate")).expanduser()
    pulled = home / "models" / name
    if pulled.is_dir():
        return pulled
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", name) or importlib.util.find_spec("huggingface_hub") is None:
        raise click.ClickException(
            f"{name} is no directory, and no pulled model ({pulled}): `gateway models pull {name}`"
        )
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"])
    )


def _options(
    model: Path, method: Method, form: Format | None, bits: str, group_size: str, symmetric: bool | None, **rest: Any
) -> QuantOptions:
    chosen = form or DEFAULT_FORMAT[method]
    if symmetric is None:
        symmetric = default_symmetric(chosen)
    try:
        size = group_size_for(model) if group_size == "auto" else int(group_size)
        grid = Grid(bits=8 if bits == "8" else 4, group_size=size, symmetric=symmetric)
        return QuantOptions(model=model, method=method, format=chosen, grid=grid, **rest)
    except ValidationError as error:
        raise click.UsageError(
            "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors())
        ) from error


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console)


def _print_summary(report: dict[str, Any], out: Path, console: Console) -> None:
    linears = [linear for layer in report["layers"] for linear in layer["linears"]]
    left = {name: reason for name, reason in report["skipped"].items() if name != "lm_head"}
    fallen = [linear["name"] for linear in linears if linear["note"]]
    console.print(
        f"{len(linears)} linears quantized in {report['elapsed_s']:.0f} s, {len(left)} matrices left alone, "
        f"{len(fallen)} with a note (quant_report.html); host peak {report['peak_host_bytes'] / 1e9:.1f} GB, "
        f"device peak {report['peak_device_bytes'] / 1e9:.1f} GB"
    )
    for reason in dict.fromkeys(left.values()):
        names = [name for name, own in left.items() if own == reason]
        console.print(f"  left alone: {len(names)}, first {names[0]}: {reason}")
    click.echo(f"wrote {out}")

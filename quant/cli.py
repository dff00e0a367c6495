"""`gateway quantize …`, also `python -m quant`. Imports torch only when a command needs it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

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
from quant.errors import QuantError
from quant.rules import Verdict, judge, read_facts

_ENGINES = ("all", "vllm", "sglang", "lmdeploy", "lmdeploy-turbomind", "lmdeploy-pytorch")
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
@click.option("--group-size", type=click.Choice([str(size) for size in GROUP_SIZES]), default="128", show_default=True)
@click.option("--symmetric/--asymmetric", default=None, help="Default: as the format asks.")
@click.option("--calib", type=_FILE, help='JSONL of {"messages": [...]} or {"text": "..."}. Default: a bundled set.')
@click.option("--calib-samples", type=int, default=128, show_default=True, help="Sequences; 0: none (rtn only).")
@click.option("--calib-tokens", type=int, default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--skip", multiple=True, metavar="REGEX", help="Linears to leave alone, by name. Repeatable.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.pass_context
def quantize(ctx: click.Context, /, model: str | None, out: Path | None, **flags: Any) -> None:
    """Quantize a checkpoint to 4 bits, or verify and convert one (subcommands)."""
    if ctx.invoked_subcommand is not None:
        return
    if model is None or out is None:
        raise click.UsageError("--model and --out are required; `quantize verify --help` for the subcommands")
    _need_torch()
    from quant.walk import quantize_checkpoint

    options = _options(find_model(model), **flags)
    console = Console(stderr=True)
    with _user_errors(out), _progress(console) as progress:
        task = progress.add_task(f"{options.method} {options.format}", total=None, note="calibrating")

        def show(step: Any) -> None:
            note = "resumed" if step.resumed else f"worst error {step.worst_error:.2%}, {step.eta_s:.0f} s left"
            progress.update(task, completed=step.layer, total=step.layers, note=note)

        report = quantize_checkpoint(options, out, show)
    _print_summary(report, out, console)


@quantize.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--engine", type=click.Choice(_ENGINES), default="all", show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: every device a rule knows.")
@click.option("--original", type=_DIRECTORY, help="Unquantized model: also compare perplexity, KL and first choices.")
@click.option("--text", type=_FILE, help="Plain text to compare on. Required with --original.")
@click.option("--samples", type=int, default=16, show_default=True, help="Sequences of the text.")
@click.option("--tokens", type=int, default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--static", is_flag=True, help="Configuration and headers only: no torch, no weights read.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(
    directory: Path,
    engine: str,
    device: str | None,
    original: Path | None,
    text: Path | None,
    samples: int,
    tokens: int,
    static: bool,
    as_json: bool,
) -> None:
    """Say which engines load DIRECTORY, and how far it is from the original.

    Exits 1 when none of the engines and devices asked for takes it, or when the files are broken.
    """
    if (original is None) != (text is None):
        raise click.UsageError("--original and --text go together")
    result: dict[str, Any] = {}
    with _user_errors():
        facts = read_facts(directory)
        verdicts = judge(facts, None if engine == "all" else engine, device)
        result = {"format": facts.scheme.format, "linears": len(facts.linears), **facts.properties}
        result["engines"] = [asdict(verdict) for verdict in verdicts]
        if not static:
            _need_torch()
            from quant.verify import round_trip

            result["round_trip_linears"] = round_trip(directory)
        if original is not None and text is not None:
            result["quality"] = _compare(original, directory, text, samples, tokens)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _print_verdicts(directory, result, verdicts)
    sys.exit(0 if any(verdict.outcome != "refused" for verdict in verdicts) else 1)


@quantize.command("convert")
@click.argument("directory", type=_DIRECTORY)
@click.option("--format", "form", type=click.Choice(FORMATS), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write; must not exist.")
def convert_command(directory: Path, form: Format, out: Path) -> None:
    """Write a quantized DIRECTORY in another format, exactly: no weight changes, or it is refused."""
    _need_torch()
    from quant.convert import convert

    with _user_errors(out):
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
    if name.count("/") != 1 or importlib.util.find_spec("huggingface_hub") is None:
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
        grid = Grid(bits=8 if bits == "8" else 4, group_size=int(group_size), symmetric=symmetric)
        return QuantOptions(model=model, method=method, format=chosen, grid=grid, **rest)
    except ValidationError as error:
        raise click.UsageError(
            "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors())
        ) from error


def _compare(original: Path, directory: Path, text: Path, samples: int, tokens: int) -> dict[str, Any]:
    from quant.evaluate import evaluate, evaluation_tokens
    from quant.walk import resolve_device

    quality = evaluate(original, directory, evaluation_tokens(original, text, samples, tokens), resolve_device("auto"))
    return asdict(quality) | {"perplexity_ratio": quality.perplexity_ratio}


class _user_errors:
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


def _need_torch() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"this needs {' and '.join(missing)}: pip install 'tunegate[quant]'")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console)


def _print_summary(report: dict[str, Any], out: Path, console: Console) -> None:
    linears = [linear for layer in report["layers"] for linear in layer["linears"]]
    left = {name: reason for name, reason in report["skipped"].items() if name != "lm_head"}
    fallen = [linear["name"] for linear in linears if linear["note"]]
    console.print(
        f"{len(linears)} linears quantized in {report['elapsed_s']:.0f} s, {len(left)} matrices left alone, "
        f"{len(fallen)} with a note (quant_report.json); host peak {report['peak_host_bytes'] / 1e9:.1f} GB, "
        f"device peak {report['peak_device_bytes'] / 1e9:.1f} GB"
    )
    for reason in dict.fromkeys(left.values()):
        names = [name for name, own in left.items() if own == reason]
        console.print(f"  left alone: {len(names)}, first {names[0]}: {reason}")
    click.echo(f"wrote {out}")


def _print_verdicts(directory: Path, result: dict[str, Any], verdicts: list[Verdict]) -> None:
    console = Console()
    checked = f", {result['round_trip_linears']} packed bit-exact" if "round_trip_linears" in result else ""
    console.print(f"{directory}: {result['format']}, {result['linears']} linears{checked}", soft_wrap=True)
    table = Table("engine", "device", "verdict", "why", "checked at", box=None)
    for verdict in verdicts:
        table.add_row(
            verdict.engine,
            verdict.device,
            verdict.outcome,
            "; ".join(verdict.reasons) or verdict.note,
            verdict.verified,
        )
    console.print(table)
    if "quality" in result:
        quality = result["quality"]
        console.print(
            f"perplexity {quality['original_perplexity']:.3f} -> {quality['perplexity']:.3f} "
            f"({quality['perplexity_ratio'] - 1:+.2%}), KL {quality['kl_nats']:.4f} nats, "
            f"same first choice {quality['top1_agreement']:.2%} of {quality['tokens']} tokens"
        )

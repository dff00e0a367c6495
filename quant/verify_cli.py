"""`gateway quantize verify`: every check that there is of a quantized checkpoint, each when it is asked for."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from quant.console import need_torch, user_errors
from quant.rules import judge, read_facts

_ENGINES = ("all", "vllm", "sglang", "lmdeploy", "lmdeploy-turbomind", "lmdeploy-pytorch")
_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--engine", type=click.Choice(_ENGINES), default="all", show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: every device a rule knows.")
@click.option("--original", type=_DIRECTORY, help="Unquantized model: also compare perplexity, KL and first choices.")
@click.option("--text", type=_FILE, help="Plain text to compare on. Required with --original.")
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences of the text.")
@click.option("--tokens", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--adapters", type=_DIRECTORY, multiple=True, help="Adapter, or directory of some: do they survive?")
@click.option("--serve", is_flag=True, help="Start the installed --engine on it: a short answer, and a long text.")
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
    adapters: tuple[Path, ...],
    serve: bool,
    static: bool,
    as_json: bool,
) -> None:
    """Say which engines load DIRECTORY, and how far it is from the original.

    Exits 1 when none of the engines and devices asked for takes it, when the files are broken, when an adapter does not
    survive, or when the engine does not answer as it should.
    """
    if (original is None) != (text is None):
        raise click.UsageError("--original and --text go together")
    if serve and engine not in ("vllm", "sglang", "lmdeploy"):
        raise click.UsageError("--serve needs one engine: --engine vllm, sglang or lmdeploy")
    with user_errors():
        facts = read_facts(directory)
        verdicts = judge(facts, None if engine == "all" else engine, device)
        result: dict[str, Any] = {"format": facts.scheme.format, "linears": len(facts.linears), **facts.properties}
        result["engines"] = [asdict(verdict) for verdict in verdicts]
        passed = any(verdict.outcome != "refused" for verdict in verdicts)
        if not static:
            need_torch()
            from quant.verify import round_trip

            result["round_trip_linears"] = round_trip(directory)
        if original is not None and text is not None:
            result["quality"] = _compare(original, directory, text, samples, tokens)
        if adapters:
            result["adapters"] = _survivals(directory, adapters)
            passed = passed and all(row["survives"] for row in result["adapters"])
        if serve and not passed:
            result["not_served"] = "what is found above comes first"
        elif serve:
            result["served"] = _served(directory, engine, device, original)
            passed = not result["served"]["faults"]
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _print(directory, result)
    sys.exit(0 if passed else 1)


def _compare(original: Path, directory: Path, text: Path, samples: int, tokens: int) -> dict[str, Any]:
    from quant.evaluate import evaluate, evaluation_tokens
    from quant.walk import resolve_device

    quality = evaluate(original, directory, evaluation_tokens(original, text, samples, tokens), resolve_device("auto"))
    return asdict(quality) | {"perplexity_ratio": quality.perplexity_ratio}


def _survivals(directory: Path, adapters: tuple[Path, ...]) -> list[dict[str, Any]]:
    need_torch()
    from quant.adapters import find_adapters, survivals
    from quant.walk import resolve_device

    found = find_adapters(adapters)
    return [asdict(survival) for survival in survivals(directory, found, resolve_device("auto"))]


def _served(directory: Path, engine: str, device: str | None, original: Path | None) -> dict[str, Any]:
    from quant.served import ask, faults

    answers = ask(directory, engine, device)
    before = ask(original, engine, device) if original is not None else None
    return asdict(answers) | {"faults": faults(answers, before), "original": asdict(before) if before else None}


def _print(directory: Path, result: dict[str, Any]) -> None:
    console = Console()
    checked = f", {result['round_trip_linears']} packed bit-exact" if "round_trip_linears" in result else ""
    console.print(f"{directory}: {result['format']}, {result['linears']} linears{checked}", soft_wrap=True)
    table = Table("engine", "device", "verdict", "why", "checked at", box=None)
    for row in result["engines"]:
        why = "; ".join(row["reasons"]) or row["note"]
        table.add_row(row["engine"], row["device"], row["outcome"], why, row["verified"])
    console.print(table)
    if "quality" in result:
        quality = result["quality"]
        console.print(
            f"perplexity {quality['original_perplexity']:.3f} -> {quality['perplexity']:.3f} "
            f"({quality['perplexity_ratio'] - 1:+.2%}), KL {quality['kl_nats']:.4f} nats, "
            f"same first choice {quality['top1_agreement']:.2%} of {quality['tokens']} tokens"
        )
    if "adapters" in result:
        console.print(_adapter_table(result["adapters"]))
    if "not_served" in result:
        console.print(f"not served: {result['not_served']}")
    if "served" in result:
        served = result["served"]
        console.print(f"answer: {served['answer']!r}", soft_wrap=True)
        before = f" (of the original's {served['original']['distinct']:.0%})" if served["original"] else ""
        console.print(
            f"long text: {served['long_tokens']} tokens, {served['distinct']:.0%} of its runs of four words differ"
            f"{before}; {'; '.join(served['faults']) or 'no fault'}",
            soft_wrap=True,
        )


def _adapter_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("adapter", "survives", "same choice", "mean nats", "worst nats", "gain kept", box=None)
    for row in rows:
        kept = "-" if row["gain_kept"] is None else f"{row['gain_kept']:.1%}"
        figures = (f"{row['same_choice']:.1%}", f"{row['mean_nats']:.3f}", f"{row['worst_nats']:.3f}", kept)
        table.add_row(row["adapter"], "yes" if row["survives"] else "no", *figures)
    return table

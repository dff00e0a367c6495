"""`gateway bench`, also `python -m bench`: run, sweep, capacity, compare, selftest, replay."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console

from bench.config import RunConfig, load_config, resolved
from bench.load.fleet import FleetError
from bench.measure.record import read_record
from bench.options import GroupedCommand, given, run_options
from bench.report.live import LiveView, Silent
from bench.report.table import print_run
from bench.results import Result, analyse, save
from bench.run import Observer
from bench.run import run as run_load
from bench.workload.calibrate import ServerError

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(context_settings=_CONTEXT)
def bench() -> None:
    """Measure a server's speed under load, and say whether the figures may be believed."""


def configured(config_file: Path | None, flags: dict[str, Any]) -> RunConfig:
    """The configuration of a command. Raises click.UsageError."""
    try:
        return load_config(config_file, given(flags))
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error


def common_options(command: Any) -> Any:
    """The flags of every command that puts load on a server."""
    command = run_options(command)
    command = click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")(command)
    return click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="YAML of the flags.",
    )(command)


def _console(stderr: bool = False) -> Console:
    """A console; what goes to a file or a pipe is not squeezed into 80 columns."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = max(console.width, 130)
    return console


@contextmanager
def failures_shown() -> Iterator[None]:
    """Turn what servers and machines do wrong into one line."""
    try:
        yield
    except (OSError, ServerError, FleetError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def observing(config: RunConfig, console: Console, total_s: float) -> Iterator[Observer]:
    """A live view where there is a terminal to show it in."""
    if config.quiet or not console.is_terminal:
        yield Silent()
    else:
        with LiveView(console, total_s) as view:
            yield view


def shown(result: Result, config: RunConfig, console: Console) -> None:
    """Print the tables and write the files."""
    print_run(console, result.summary, result.verdict, result.paired)
    folder = save(result, config.out, config.name)
    console.print(f"record, JSON and HTML: {folder}", style="dim", highlight=False)


@bench.command(cls=GroupedCommand)
@common_options
def run(config_file: Path | None, print_config: bool, **flags: Any) -> None:
    """Put one load on one server, or on several in interleaved blocks."""
    config = configured(config_file, flags)
    if print_config:
        click.echo(yaml.safe_dump(resolved(config), sort_keys=False), nl=False)
        return
    console = _console()
    total_s = config.repeats * config.duration * max(1, len(config.target))
    with failures_shown(), observing(config, console, total_s) as observer:
        record = run_load(config, observer)
    result = analyse(record)
    shown(result, config, console)
    click.get_current_context().exit(result.verdict.exit_code)


@bench.command()
@click.argument("record_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write JSON and HTML here too.")
def replay(record_file: Path, out: Path | None) -> None:
    """Compute every figure again from a raw record."""
    try:
        result = analyse(read_record(record_file))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    console = _console()
    print_run(console, result.summary, result.verdict, result.paired)
    if out is not None:
        console.print(f"JSON and HTML: {save(result, out.parent, out.name, with_record=False)}", highlight=False)
    click.get_current_context().exit(result.verdict.exit_code)


@bench.command(cls=GroupedCommand)
@click.option("--rates", help="Rates to try, such as 1,2,4,8 (default: found from what the server can do).")
@click.option("--concurrencies", help="Users to try instead of rates, such as 1,8,64.")
@common_options
def sweep(
    rates: str | None, concurrencies: str | None, config_file: Path | None, print_config: bool, **flags: Any
) -> None:
    """Load against latency: one server under several loads."""
    from bench.report.sweep import print_points, save_sweep
    from bench.search import auto_rates, points_of
    from bench.search import sweep as run_sweep

    if rates and concurrencies:
        raise click.UsageError("--rates and --concurrencies exclude each other")
    config = configured(config_file, {"rate": 1.0} | given(flags))
    if print_config:
        click.echo(yaml.safe_dump(resolved(config), sort_keys=False), nl=False)
        return
    console = _console()
    with failures_shown():
        listed = _numbers(concurrencies or rates)
        loads = listed or auto_rates(config, Silent())
        with observing(config, console, len(loads) * config.repeats * config.duration) as observer:
            record = run_sweep(config, loads, "concurrency" if concurrencies else "rate", observer)
    points = points_of(record)
    print_points(console, points)
    console.print(f"record and HTML: {save_sweep(record, points, config)}", style="dim", highlight=False)


@bench.command(cls=GroupedCommand)
@click.option("--start-rate", default=1.0, show_default=True, help="The first rate tried.")
@common_options
@click.pass_context
def capacity(
    ctx: click.Context, /, start_rate: float, config_file: Path | None, print_config: bool, **flags: Any
) -> None:
    """The highest rate that keeps a --slo, tried twice."""
    from bench.report.sweep import save_sweep
    from bench.search import capacity as search
    from bench.search import points_of

    config = configured(config_file, {"rate": start_rate} | given(flags))
    if print_config:
        click.echo(yaml.safe_dump(resolved(config), sort_keys=False), nl=False)
        return
    if not config.slo:
        raise click.UsageError("capacity needs an objective: --slo ttft_p99=200,tpot_p99=50")
    console = _console()
    with failures_shown(), observing(config, console, 8 * config.duration) as observer:
        found, record = search(config, start_rate, observer)
    for probe in found.probes:
        console.print(f"{probe.rate:9.2f}/s  {'[green]kept[/]' if probe.kept else '[red]broken[/]  ' + probe.why}")
    if found.rate is None:
        console.print("[red bold]no rate kept the objective[/]")
    else:
        console.print(f"[bold]{found.rate:.2f} requests/s[/] under {config.slo}, confirmed")
    console.print(f"record and HTML: {save_sweep(record, points_of(record), config)}", style="dim", highlight=False)
    ctx.exit(0 if found.confirmed else 3)


@bench.command()
@click.argument("before", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--gate", multiple=True, help="Fail when a figure is worse by more, such as tpot_p99:+5%.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def compare(ctx: click.Context, /, before: Path, after: Path, gate: tuple[str, ...], as_json: bool) -> None:
    """What differs between two records beyond chance. Exit status 4 when a gate is broken."""
    from bench.compare import broken, compare_files, comparison_json, print_comparison
    from bench.measure.compare import parse_gate

    try:
        gates = [parse_gate(text) for text in gate]
        comparison = compare_files(before, after)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    console = _console()
    if as_json:
        click.echo(comparison_json(comparison))
    else:
        print_comparison(console, comparison)
    lines = broken(comparison.changes, gates)
    for line in lines:
        console.print(f"[red]gate broken:[/] {line}", highlight=False)
    ctx.exit(4 if lines else 0)


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in (text or "").split(",") if part]
    except ValueError as error:
        raise click.UsageError(f"numbers with commas between them expected, got {text!r}") from error


@bench.command()
@click.option("--streams", default=256, show_default=True, help="Streams at a time.")
@click.option("--speed", default=50.0, show_default=True, help="Tokens per second of each stream.")
@click.option("--tokens", default=200, show_default=True, help="Tokens of each answer.")
@click.option("--requests", default=1024, show_default=True, help="Answers to read.")
@click.option(
    "--versus",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The program of another load generator (vllm, guidellm or aiperf); repeatable.",
)
@click.option("--tokenizer", default="", help="Tokenizer folder for those that need one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def selftest(
    streams: int, speed: float, tokens: int, requests: int, versus: tuple[Path, ...], tokenizer: str, as_json: bool
) -> None:
    """What this client can do on this machine, beside other load generators on one stream source."""
    from bench.report.selftest import costs_json, print_costs
    from bench.selftest.ceiling import remember
    from bench.selftest.check import SelfTestError, accuracy, measure, source
    from bench.selftest.rivals import Job
    from bench.selftest.source import MODEL

    log = Path(tempfile.gettempdir()) / "bench-selftest.log"
    console = _console(as_json)
    costs = []
    try:
        with failures_shown(), source(1000 / speed) as url:
            job = Job(url, MODEL, requests, streams, tokens, tokenizer=tokenizer)
            true = accuracy(url, 1000 / speed, 8, log)
            for program in (None, *versus):
                console.print(f"{requests} streams of {tokens} tokens: {program or 'this bench'}", style="dim")
                costs.append(measure(program, job, log))
    except SelfTestError as error:
        raise click.ClickException(str(error)) from error
    remember(costs[0].ceiling_events_per_s, costs[0].cpu_us_per_event)
    if as_json:
        click.echo(costs_json(costs, true))
    else:
        print_costs(console, costs, true)

"""`gateway jobs …`: the fine-tuning jobs of a running gateway, from the command line."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from gateway.cli.client import GatewayClient, connection_options, print_json

_PATH = "/v1/fine_tuning/jobs"
_OVER = ("succeeded", "failed", "cancelled")
_LOOK_S = 1.0


@click.group()
def jobs() -> None:
    """Fine-tuning jobs of a running gateway. Make them with the OpenAI client; needs a key with the scope `train`."""


@jobs.command("list")
@connection_options
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="The newest so many.")
@click.option("--json", "as_json", is_flag=True, help="Print the API's own answer.")
def list_jobs(limit: int, as_json: bool, url: str, api_key: str | None) -> None:
    """List jobs, newest first."""
    answer = GatewayClient(url, api_key).call("GET", _PATH, params={"limit": limit})
    if as_json:
        print_json(answer)
        return
    table = Table(box=None)
    for column in ("id", "status", "method", "created"):
        table.add_column(column, no_wrap=True)
    table.add_column("model", overflow="fold")
    for job in answer["data"]:
        created = time.strftime("%Y-%m-%d %H:%M", time.gmtime(job["created_at"]))
        what = job["fine_tuned_model"] or (job["error"] or {}).get("message", "").partition("\n")[0][:80]
        what = what or ("until requests no longer queue" if "paused_for" in job["tunegate"] else "")
        table.add_row(job["id"], job["status"], job["method"]["type"], created, what)
    Console().print(table)


@jobs.command()
@connection_options
@click.argument("job_id")
def show(job_id: str, url: str, api_key: str | None) -> None:
    """Show one job as the API has it."""
    print_json(GatewayClient(url, api_key).call("GET", f"{_PATH}/{job_id}"))


@jobs.command()
@connection_options
@click.argument("job_id")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job is over.")
def logs(job_id: str, follow: bool, url: str, api_key: str | None) -> None:
    """Print a job's events, oldest first."""
    client = GatewayClient(url, api_key)
    seen = 0
    while True:
        over = client.call("GET", f"{_PATH}/{job_id}")["status"] in _OVER
        for event in _events_behind(client, job_id, seen):
            seen = _number(event)
            at = time.strftime("%H:%M:%S", time.gmtime(event["created_at"]))
            click.echo(f"{at} {event['level']:<5} {event['message']}")
        if over or not follow:
            return
        time.sleep(_LOOK_S)


def _command(name: str, help: str) -> click.Command:
    @connection_options
    @click.argument("job_id")
    def run(job_id: str, url: str, api_key: str | None) -> None:
        job = GatewayClient(url, api_key).call("POST", f"{_PATH}/{job_id}/{name}")
        click.echo(f"{job['id']} {job['status']}")

    run.__doc__ = help
    return click.command(name)(run)


jobs.add_command(_command("cancel", "End a job for good; what it trained so far is dropped."))
jobs.add_command(_command("pause", "Have a job stop after its step, with a checkpoint. The next in the queue begins."))
jobs.add_command(_command("resume", "Queue a paused job again; it goes on where it stood."))


def _events_behind(client: GatewayClient, job_id: str, seen: int) -> list[dict[str, Any]]:
    """Events newer than number `seen`, oldest first; the API gives pages, newest first."""
    found: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = client.call("GET", f"{_PATH}/{job_id}/events", params={"limit": 100, **after})
        new = [event for event in page["data"] if _number(event) > seen]
        found += new
        if not page["has_more"] or len(new) < len(page["data"]):
            return found[::-1]
        after = {"after": page["last_id"]}


def _number(event: dict[str, Any]) -> int:
    return int(event["id"].removeprefix("ftevent-"))

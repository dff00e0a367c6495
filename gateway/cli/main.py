"""The root command. Groups are imported only when called, so that `gateway --help` stays quick."""

from __future__ import annotations

import importlib

import click

import gateway

_COMMANDS = {
    "serve": ("gateway.cli.serve:serve", "Serve a model and its adapters over the OpenAI API."),
    "engines": ("gateway.cli.engines:engines", "Install and inspect engines."),
    "models": ("gateway.cli.models:models", "Bring and list base models."),
    "adapters": ("gateway.cli.residency:adapters", "Upload, list, load and delete LoRA adapters."),
    "backend": ("gateway.cli.backend:backend", "Show or switch the engine of a running gateway."),
    "reload": ("gateway.cli.backend:reload_config", "Have a running gateway read its configuration again."),
    "keys": ("gateway.cli.keys:keys", "Make, list, rotate and revoke API keys."),
    "jobs": ("gateway.cli.jobs:jobs", "List, follow, pause and cancel fine-tuning jobs."),
    "train": ("gateway.cli.train:train", "Fine-tune a model into an adapter."),
    "quantize": ("quant.cli:quantize", "Quantize, verify and convert checkpoints."),
    "bench": ("bench.cli:bench", "Measure a server's speed under load."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in _COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(gateway.__version__, prog_name="gateway")
def main() -> None:
    """Tunegate: one OpenAI API over vLLM, SGLang and LMDeploy, with hot-swappable LoRA adapters."""

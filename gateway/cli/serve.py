"""`gateway serve`: resolve the configuration, check it, hand over to the main process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import yaml

from backends.base import BackendError
from gateway import config, launcher
from gateway.cli.options import GroupedCommand, given, options_from


@click.command(cls=GroupedCommand)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file with the keys below.")
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")
@options_from(config.ServeConfig)
def serve(config_file: Path | None, print_config: bool, **flags: Any) -> None:
    """Serve a model and its LoRA adapters over the OpenAI API.

    A flag wins over the file. Prints `ready http://HOST:PORT model=NAME` on stdout once requests are answered.
    """
    try:
        source = launcher.Source(config_file.absolute() if config_file else None, given(flags))
        resolved = config.load(config_file, source.flags)
        if print_config:
            click.echo(_as_yaml(resolved), nl=False)
            return
        status = launcher.serve(resolved, source)
    except (config.ConfigError, BackendError) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(status)


def _as_yaml(resolved: config.ServeConfig) -> str:
    values = resolved.model_dump(mode="json") | {"state": str(resolved.state_dir), "model_name": resolved.public_name}
    for secret in ("api_key", "attach_key"):
        values[secret] = "***" if values[secret] else values[secret]
    return yaml.safe_dump(values, sort_keys=False)

"""Packages that only some configurations need: what is missing is said before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.origins import parse_origin

_EXTRAS = {"pyarrow": "data", "datasets": "data", "tensorboard": "tensorboard", "wandb": "wandb"}


def require_for(config: TrainConfig) -> None:
    """Raises ConfigError where a package that the run needs is not installed."""
    require([*packages_of([*config.dataset, *config.eval_dataset]), *config.report_to])


def packages_of(origins: Iterable[str]) -> list[str]:
    """What reading these takes beside ourselves."""
    return [package for text in origins if (package := parse_origin(text).package)]


def require(packages: Iterable[str]) -> None:
    """Raises ConfigError that names the extras to install."""
    missing = sorted({package for package in packages if importlib.util.find_spec(package) is None})
    if missing:
        extras = ",".join(sorted({_EXTRAS[package] for package in missing}))
        raise ConfigError(f"this needs {' and '.join(missing)}: pip install 'tunegate[{extras}]'")

"""Before the load: resolve the servers, ask what they accept, learn their tokenizer, write down what they are."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

import msgspec

from bench import __version__
from bench.config import RunConfig, extra_body, targets_of
from bench.load.gpus import Gpus
from bench.load.loop import Target
from bench.load.watch import MetricsPage
from bench.wire.connection import KERNEL_STAMPS
from bench.wire.http import resolve
from bench.workload.bodies import PATHS, Asking, Dialect
from bench.workload.calibrate import Server, find_dialect, find_tokenization, served_model
from bench.workload.words import Tokenization

_INFO_PATHS = ("/version", "/get_server_info", "/server_info")
_INFO_BYTES = 20_000
_RESET_PATHS = ("/reset_prefix_cache", "/flush_cache")


class Prepared(msgspec.Struct):
    """What was found out before the load."""

    targets: list[Target]
    servers: dict[str, Server]
    models: dict[str, list[str]]
    base_models: dict[str, str]
    asking: Asking
    tokens: Tokenization
    pages: list[MetricsPage]
    about: dict[str, dict[str, Any]]


def prepare(config: RunConfig) -> Prepared:
    """Ask every target. Raises OSError when one does not answer and ServerError when one cannot serve the load."""
    specs = targets_of(config)
    targets, servers, models, base_models, dialects = [], {}, {}, {}, []
    asking = Asking(config.api, Dialect(), config.temperature, extra_body(config))
    for spec in specs:
        headers = {"authorization": f"Bearer {spec.key}"} if spec.key else {}
        endpoint = resolve(spec.url)
        server = servers[spec.name] = Server(endpoint, headers)
        targets.append(Target(spec.name, endpoint, PATHS[config.api], headers))
        base_models[spec.name] = spec.model or served_model(server)
        models[spec.name] = list(spec.adapters) or [base_models[spec.name]]
        dialects.append(find_dialect(server, asking, base_models[spec.name]))
    asking = msgspec.structs.replace(asking, dialect=_common(dialects))
    first = specs[0].name
    return Prepared(
        targets=targets,
        servers=servers,
        models=models,
        base_models=base_models,
        asking=asking,
        tokens=find_tokenization(servers[first], asking, base_models[first]),
        pages=_pages(config, servers),
        about={name: _about(server, base_models[name], asking) for name, server in servers.items()},
    )


def _common(dialects: list[Dialect]) -> Dialect:
    """What every target accepts, so that all are asked the same."""
    return Dialect(
        usage=all(dialect.usage for dialect in dialects),
        usage_per_chunk=all(dialect.usage_per_chunk for dialect in dialects),
        ignore_eos=all(dialect.ignore_eos for dialect in dialects),
        length_key=dialects[0].length_key,
    )


def _pages(config: RunConfig, servers: dict[str, Server]) -> list[MetricsPage]:
    pages = []
    for text in config.metrics_url:
        name, separator, url = text.partition("=")
        if not separator:
            raise ValueError(f"metrics url {text!r}: NAME=URL expected")
        base, slash, path = url.removesuffix("/").rpartition("/")
        pages.append(MetricsPage(name, resolve(base if slash else url), f"/{path}", {}))
    return pages or [MetricsPage(name, s.endpoint, "/metrics", s.headers) for name, s in servers.items()]


def _about(server: Server, model: str, asking: Asking) -> dict[str, Any]:
    found: dict[str, Any] = {
        "url": server.endpoint.url,
        "model": model,
        "dialect": msgspec.to_builtins(asking.dialect),
    }
    for path in _INFO_PATHS:
        answer = server.get(path)
        if answer.ok and answer.json() is not None and len(answer.body) < _INFO_BYTES:
            found[path] = answer.json()
    return found


def reset_caches(prepared: Prepared) -> list[str]:
    """Ask each server to forget its prefix cache; names the servers that did. Servers without such a route are left."""
    done = []
    for name, server in prepared.servers.items():
        for path in _RESET_PATHS:
            answer = server.post(path, {})
            if answer.ok:
                done.append(name)
                break
    return done


def environment(workers: int) -> dict[str, Any]:
    """This client's machine and versions."""
    git = shutil.which("git")
    revision = ""
    if git is not None:
        shown = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        revision = shown.stdout.strip()
    return {
        "bench": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "workers": workers,
        "stamps": "kernel" if KERNEL_STAMPS else "client",
        "git": revision,
        "gpus": Gpus().names(),
    }

"""Put one case to an engine over plain http.client and describe the answer as JSON that is stable between runs."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from scripts.recorder.cases import Case

KEPT_HEADERS = (
    "content-type",
    "www-authenticate",
    "allow",
    "retry-after",
    "x-request-id",
    "transfer-encoding",
    "connection",
)
_TIMEOUT_S = 180
_KEPT_LOGPROBS = 6
_KEPT_EVENTS = 8  # from the start and from the end of a stream
# What differs between two runs of the same engine on the same request.
_VOLATILE_KEYS = {
    "created",
    "created_at",
    "completed_at",
    "time",
    "e2e_latency",
    "ts",
    "timestamp",
    "last_receive_tstamp",
}
_VOLATILE_TEXT = [
    (
        re.compile(r"\b(chatcmpl|cmpl|modelperm|resp|msg|embd|rs|chatcmpl-tool|call|tokn)([-_])[0-9A-Za-z-]{8,}"),
        r"\1\2<id>",
    ),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<id>"),
    (re.compile(r"0x[0-9a-f]{6,}"), "<address>"),
]


def ask(url: str, case: Case, key: str, places: Mapping[str, str]) -> dict[str, Any]:
    """Send `case` to the engine at `url`; returns {"request": ..., "response": ...}.

    key: API key of the engine, "" for none. places: placeholder name -> its value on this machine.
    """
    body = case.body if isinstance(case.body, bytes) or case.body is None else json.dumps(case.body).encode()
    if body is not None and not isinstance(case.body, bytes):
        for name, value in places.items():
            body = body.replace(b"{%s}" % name.encode(), value.encode())
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if case.key and key:
        headers["Authorization"] = f"Bearer {key}"
    headers |= case.headers
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_TIMEOUT_S)
    time.sleep(case.wait_s)
    started = time.monotonic()
    try:
        connection.request(case.method, case.path, body, headers)
        answer = connection.getresponse()
        described = _describe(answer, case, places)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: JSON that is none
        described = {"broken": f"{type(error).__name__}: {error}"}
    finally:
        connection.close()
    described["elapsed_s"] = round(time.monotonic() - started, 3)
    request: dict[str, Any] = {"method": case.method, "path": case.path, "key": case.key}
    if case.headers:
        request["headers"] = dict(case.headers)
    if isinstance(case.body, bytes):
        request["raw"] = case.body.decode("latin-1")
    elif case.body is not None:
        request["body"] = case.body
    return {"request": request, "response": described}


def _describe(answer: http.client.HTTPResponse, case: Case, places: Mapping[str, str]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "status": answer.status,
        "headers": {
            name: value for name, value in ((n.lower(), v) for n, v in answer.getheaders()) if name in KEPT_HEADERS
        },
    }
    content_type = described["headers"].get("content-type", "")
    if content_type.startswith("text/event-stream"):
        described |= _events(answer, case.hang_up_after, places)
        return described
    text = answer.read().decode("utf-8", "replace")
    if content_type.startswith("application/json"):
        described["json"] = normal(json.loads(text), places)
        described["compact"] = ", " not in _outside_strings(text)
    elif content_type.startswith(("text/plain; version=", "application/openmetrics-text")):
        described["families"] = families(text) if case.keep_body else {}
    else:
        described["text"] = normal_text(text, places)
    return described


def families(page: str) -> dict[str, Any]:
    """A Prometheus page without its values: family -> {help, type, samples: [[name, labels], ...]} in page order.

    A histogram's buckets are kept as their bounds; the families of Python and its process are left out.
    """
    found: dict[str, Any] = {}
    for line in page.splitlines():
        if line.startswith("# HELP "):
            name, _, help_text = line[7:].partition(" ")
            found[name] = {"help": help_text, "type": "", "samples": []}
        elif line.startswith("# TYPE "):
            name, _, kind = line[7:].partition(" ")
            found.setdefault(name, {"help": "", "samples": []})["type"] = kind
        elif line:
            family = found[list(found)[-1]]
            sample, labels = _sample(line)
            bound = labels.pop("le", None)
            if bound is not None:
                family.setdefault("buckets", []).append(bound)
            family["samples"].append([sample, labels])
    for family in found.values():
        family["samples"] = list({json.dumps(sample): sample for sample in family["samples"]}.values())
        if "buckets" in family:
            family["buckets"] = list(dict.fromkeys(family["buckets"]))
    return {name: family for name, family in found.items() if not name.startswith(("python_", "process_"))}


def _sample(line: str) -> tuple[str, dict[str, str]]:
    name, brace, rest = line.rpartition(" ")[0].partition("{")
    return name, dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', rest)) if brace else {}


def _events(answer: http.client.HTTPResponse, hang_up_after: int | None, places: Mapping[str, str]) -> dict[str, Any]:
    raw = b""
    while hang_up_after is None or raw.count(b"\n\n") < hang_up_after:
        line = answer.readline()
        if not line:
            break
        raw += line
    blocks = [block for block in raw.decode("utf-8", "replace").replace("\r\n", "\n").split("\n\n") if block]
    return {
        "line_end": "crlf" if b"\r\n" in raw else "lf",
        "compact": '", "' not in blocks[0] and '": ' not in blocks[0] if blocks else True,
        "events": [_event(block, places) for block in ends(blocks)],
        "events_left_out": len(blocks) - len(ends(blocks)),
    }


def ends(items: list[Any]) -> list[Any]:
    """The first and the last few of a long list, all of a short one."""
    return items if len(items) <= 2 * _KEPT_EVENTS else items[:_KEPT_EVENTS] + items[-_KEPT_EVENTS:]


def _event(block: str, places: Mapping[str, str]) -> Any:
    """A stream event: its JSON, its text (`[DONE]`), or, where it has an event name, both as {event, data}."""
    fields = {line.partition(": ")[0]: line.partition(": ")[2] for line in block.split("\n")}
    data = fields.get("data", "")
    value = normal(json.loads(data), places) if data.startswith("{") else data
    return {"event": fields["event"], "data": value} if "event" in fields else value


def normal(value: Any, places: Mapping[str, str]) -> Any:
    """Decoded JSON with order and shape kept, and what differs between runs made the same.

    Timestamps become 0, ids `<id>`, paths their placeholders; of long lists of numbers the start is kept.
    """
    if isinstance(value, dict):
        return {key: _normal_item(key, item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [normal(item, places) for item in value]
    return normal_text(value, places) if isinstance(value, str) else value


def _normal_item(key: str, item: Any, places: Mapping[str, str]) -> Any:
    if key in _VOLATILE_KEYS and isinstance(item, int | float):
        return 0
    if key == "embedding" and isinstance(item, list | str):
        return item[:8]
    if key in ("top_logprobs", "prompt_logprobs") and isinstance(item, list):
        return [_shortened(entry) for entry in item[:_KEPT_LOGPROBS]]
    return normal(item, places)


def _shortened(entry: Any) -> Any:
    return dict(list(entry.items())[:_KEPT_LOGPROBS]) if isinstance(entry, dict) else entry


def normal_text(text: str, places: Mapping[str, str]) -> str:
    """Replace ids by `<id>` and this machine's paths by their placeholders."""
    for name, value in places.items():
        text = text.replace(value, f"{{{name}}}")
    for pattern, replacement in _VOLATILE_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _outside_strings(text: str) -> str:
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)

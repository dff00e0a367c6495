"""What engines answer, turned into what an OpenAI client expects: usage, errors, names. Pure."""

from __future__ import annotations

import re

import msgspec

from gateway.errors import (
    EngineError,
    EngineTimeout,
    GatewayError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    Unavailable,
    error_body,
)
from gateway.relay.route import Candidate

_MESSAGE_CHARS = 2000
_PATH = re.compile(r"(?<![\w/.:])/(?!v1/)(?:[\w.@+-]+/)+[\w.@+-]*")  # of the file system, not of a URL
_TRACEBACK = re.compile(r'\s*File "[^"]*", line \d+.*', re.DOTALL)
_VALIDATION = re.compile(  # pydantic's faults as engines print them: Python dictionaries, a line each
    r"""'loc': (?P<place>\(.*?\)|'[^']*'), 'msg': (?P<quote>['"])(?P<what>.*?)(?P=quote)[,}]"""
)
_NAME = re.compile(r"[a-z_][a-z_0-9]*|\d+").fullmatch  # a field or an index; else a type that pydantic tried
_FAULTS_SHOWN = 3
_LOST_ADAPTER = re.compile(r"never been loaded|not been loaded|has been unloaded", re.IGNORECASE)
_LOST_MODEL = re.compile(r"\b(?:model|adapter|lora)\b.*(?:does not exist|not found)", re.IGNORECASE)


class Usage(msgspec.Struct, gc=False):
    """Token counts under the names of either API."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def prompt(self) -> int:
        return self.prompt_tokens or self.input_tokens or 0

    @property
    def completion(self) -> int:
        return self.completion_tokens or self.output_tokens or 0


class _Answer(msgspec.Struct):
    usage: Usage | None = None


class _Fault(msgspec.Struct):
    """All places where an engine may put what went wrong."""

    error: msgspec.Raw = msgspec.Raw(b"null")
    detail: str | list[dict[str, object]] | None = None
    message: str | None = None
    param: str | None = None
    code: object = None


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_fault = msgspec.json.Decoder(_Fault).decode


def usage_of(body: bytes) -> Usage | None:
    """The usage in a complete answer. Raises EngineError if it is not a JSON object."""
    try:
        return _decode_answer(body).usage
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EngineError(f"The engine answered what is not JSON: {error}.") from error


def engine_error(status: int, body: bytes, path: bytes, public: str, candidate: Candidate) -> GatewayError:
    """The error to show for an engine's answer of `status` >= 400 (or an error event's data, with its own code).

    What is not the client's fault does not come out as one: an engine that refuses the gateway's key or does not know
    a name that the gateway gave it.
    """
    message, param, code = _read(body)
    shown = _clean(message, public, candidate) or f"The engine answered with status {status} and no reason."
    if status in (401, 403):
        return EngineError("The engine refused the gateway's own key. This is for the gateway's operator to mend.")
    if status in (404, 405) and message in ("Not Found", "Method Not Allowed", ""):
        return NotFound(
            f"{path.decode()} is not served for `{public}`: its engine ({candidate.engine.backend}) has none."
        )
    lost = _LOST_ADAPTER.search(message) or (status == 404 and _LOST_MODEL.search(message))
    if lost and status in (400, 404):
        return Unavailable(f"An engine does not have `{public}` at the moment. Try again in a moment.")
    if status == 404:
        return NotFound(shown, param=param, code=code)
    if status == 413:
        return PayloadTooLarge(shown, param=param, code=code)
    if status == 429:
        return RateLimited(shown, param=param, code=code)
    if 400 <= status < 500:
        return InvalidRequest(shown, param=param, code=code)
    if status == 503:
        return Unavailable(shown)
    if status == 504:
        return EngineTimeout(shown)
    return EngineError(shown)


def stream_error(data: bytes, path: bytes, public: str, candidate: Candidate) -> GatewayError:
    """The error to show for an engine's error event; its status is in its `code`."""
    _, _, code = _read(data, numbers=True)
    status = int(code) if code is not None and code.isdigit() and 400 <= int(code) <= 599 else 500
    return engine_error(status, data, path, public, candidate)


def error_event(error: GatewayError) -> bytes:
    """An error within a stream, as OpenAI's clients raise it."""
    return b"data: " + error_body(error.message, error.type, error.param, error.code) + b"\n\n"


def _read(body: bytes | msgspec.Raw, numbers: bool = False) -> tuple[str, str | None, str | None]:
    """message, param, code of any engine's error body; what is no JSON is its own message.

    numbers: a code that is a number is given too (engines put the status there; OpenAI's codes are words).
    """
    try:
        fault = _decode_fault(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        text = bytes(body)[:_MESSAGE_CHARS].decode(errors="replace")
        return text.strip().strip('"'), None, None
    if bytes(fault.error) != b"null":
        return _read(fault.error, numbers)
    code = fault.code if isinstance(fault.code, str) else None
    if numbers and isinstance(fault.code, int):
        code = str(fault.code)
    if isinstance(fault.detail, list):
        return _detail(fault.detail), _place(fault.detail[0]) if fault.detail else None, code
    message = _TRACEBACK.sub("", fault.message or fault.detail or "")
    param = fault.param.removeprefix("body.") if fault.param else None
    faults = [(_words(found["place"]), found["what"]) for found in _VALIDATION.finditer(message)]
    if faults:
        message = "; ".join(f"{place}: {what}" for place, what in list(dict.fromkeys(faults))[:_FAULTS_SHOWN])
        param = faults[0][0]
    return message, param, code


def _words(place: str) -> str:
    """`('body', 'messages', 0, 'list[str]', 'role')` or `'body.messages.0.role'` as `messages.0.role`."""
    parts = re.split(r"[.,\s()']+", place)
    return ".".join(part for part in parts if _NAME(part) and part != "body") or "body"


def _detail(faults: list[dict[str, object]]) -> str:
    """FastAPI's list of what is wrong where."""
    return "; ".join(f"{_place(fault)}: {fault.get('msg')}" for fault in faults[:_FAULTS_SHOWN])


def _place(fault: dict[str, object]) -> str:
    location = fault.get("loc")
    return _words(".".join(map(str, location)) if isinstance(location, list) else str(location))


def _clean(message: str, public: str, candidate: Candidate) -> str:
    """The message without what is only ours to know: engine-side names and file paths."""
    for name in (candidate.model, candidate.model.rpartition(":")[2]):
        if name != public:
            message = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", lambda _: public, message)
    return _PATH.sub("<path>", message)[:_MESSAGE_CHARS]

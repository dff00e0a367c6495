"""What the relay reads of an inference request's body, and how it changes one without writing it anew."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from gateway.errors import InvalidRequest

_ABSENT = msgspec.Raw(b"null")


class StreamOptions(msgspec.Struct):
    """The one member that the relay acts on; the others go to the engine as they are."""

    include_usage: bool | None = None


class Head(msgspec.Struct, gc=False):
    """The fields that decide where a request goes. Everything else is the engine's business.

    The fields typed None would let a client reach past the gateway, so any value but null is refused. The relay
    never forwards them silently dropped: an ignored adapter name would be answered by the base model.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None  # SGLang streams one answer where none are asked for
    # with one of these an answer is more than text (see `plain`); as they stand
    tools: msgspec.Raw = _ABSENT
    response_format: msgspec.Raw = _ABSENT
    logprobs: msgspec.Raw = _ABSENT
    # adapters, by engine-side name or by path
    lora_path: None = None
    lora_name: None = None
    adapter_name: None = None
    # sessions, request ids and caches that belong to other requests
    rid: None = None
    session_id: None = None
    session_params: None = None
    with_cache: None = None
    preserve_cache: None = None
    # addresses and ranks inside a deployment
    bootstrap_host: None = None
    bootstrap_port: None = None
    bootstrap_room: None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    migration_request: None = None
    data_parallel_rank: None = None
    routed_dp_rank: None = None
    disagg_prefill_dp_rank: None = None
    # code
    custom_logit_processor: None = None

    @property
    def plain(self) -> bool:
        """Nothing speaks at first sight against continuing the answer on another replica."""
        return self.tools is _ABSENT and self.response_format is _ABSENT and self.logprobs is _ABSENT


RESERVED = frozenset(Head.__struct_fields__) - {
    "model", "stream", "stream_options", "n", "tools", "response_format", "logprobs",
}  # fmt: skip
_ADAPTER_FIELDS = frozenset({"lora_path", "lora_name", "adapter_name"})

_decode = msgspec.json.Decoder(Head).decode
_decode_options = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_FAULT = re.compile(r"(?P<what>.*) - at `\$\.(?P<field>\w+)")


def decode(body: bytes) -> Head:
    """Check that `body` is one JSON object and read its head. Raises InvalidRequest.

    Of repeated keys the last counts, here as in every engine's parser: what was checked is what will be used.
    """
    try:
        return _decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if not body.strip():
            raise InvalidRequest("The request has no body; a JSON object is expected.") from error
        raise InvalidRequest(f"The request's body is not JSON: {error}.") from error


def refuse_empty_prompt(body: bytes) -> None:
    """An empty prompt ends LMDeploy's engine for good, and no engine answers one. Raises InvalidRequest."""
    try:
        prompt = _decode_prompt(body).prompt
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"`prompt` cannot be read: {error}.", param="prompt") from error
    if prompt in ("", []) or (isinstance(prompt, list) and any(part in ("", []) for part in prompt)):
        raise InvalidRequest("`prompt` is empty; it takes a text, token ids, or a list of these.", param="prompt")


def with_usage(body: bytes, options: StreamOptions | None) -> bytes:
    """The members to append so that the engine reports usage at the stream's end; the client's options are kept.

    Raises InvalidRequest.
    """
    if options is None:
        return b',"stream_options":{"include_usage":true}'
    try:
        given = msgspec.json.decode(body, type=_RawOptions).stream_options
        merged = _decode_options(given) | {"include_usage": msgspec.Raw(b"true")}
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"`stream_options` cannot be read: {error}.", param="stream_options") from error
    return b',"stream_options":' + msgspec.json.encode(merged)


def overridden(body: bytes, members: bytes) -> list[bytes | memoryview]:
    """`body` with `members` (each `,"name":value`) as its last ones, so that they count. In pieces, uncopied."""
    end = body.rfind(b"}")
    return [memoryview(body)[:end], members + b"}"]


class _RawOptions(msgspec.Struct):
    stream_options: msgspec.Raw


class _Prompt(msgspec.Struct):
    prompt: Any = None


_decode_prompt = msgspec.json.Decoder(_Prompt).decode


def _explain(fault: str) -> InvalidRequest:
    if "missing required field `model`" in fault:
        return InvalidRequest("The request names no `model`; GET /v1/models lists the names.", param="model")
    found = _FAULT.match(fault)
    if found is None:
        return InvalidRequest(f"The request's body must be a JSON object. {fault}.")
    field = found["field"]
    if field in _ADAPTER_FIELDS:
        return InvalidRequest(f"`{field}` is not accepted: name the adapter in `model`.", param=field)
    if field in RESERVED:
        return InvalidRequest(f"`{field}` is not accepted: it is between the gateway and its engines.", param=field)
    if field == "n":
        return InvalidRequest(
            f"`n`, how many answers, is a whole number of at least 1: {found['what'].lower()}.", param="n"
        )
    return InvalidRequest(f"`{field}` has the wrong type: {found['what'].lower()}.", param=field)

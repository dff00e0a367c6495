"""The OpenAPI document: control's own routes as FastAPI knows them, and those that the relay answers or hands on.

Of an inference request it says what the gateway itself reads and insists on; the rest is the engine's.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_NOT_EMPTY = {"type": "string", "minLength": 1}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
_MESSAGE = {"type": "object", "properties": {"role": _NOT_EMPTY, "content": _CONTENT}, "required": ["role", "content"]}
_STREAMS = {
    "stream": {"type": "boolean"},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
}
_TOKENS = {"max_tokens": {"type": "integer", "minimum": 1}}

# path -> (summary, members beside `model`, which of them are required)
_INFERENCE: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "/v1/chat/completions": (
        "Answer a conversation",
        {"messages": {"type": "array", "items": _MESSAGE, "minItems": 1}, **_STREAMS, **_TOKENS},
        ["messages"],
    ),
    "/v1/completions": ("Continue a text", {"prompt": _NOT_EMPTY, **_STREAMS, **_TOKENS}, ["prompt"]),
    "/v1/embeddings": ("Embed texts (--task embed)", {"input": _CONTENT}, ["input"]),
    "/v1/responses": ("Answer by the Responses API", {"input": _CONTENT, "stream": {"type": "boolean"}}, ["input"]),
    "/tokenize": ("Tokens of a text", {"prompt": _NOT_EMPTY}, ["prompt"]),
    "/detokenize": ("Text of tokens", {"tokens": {"type": "array", "items": {"type": "integer"}}}, ["tokens"]),
}
_OWN = {"/health": "The process is alive", "/ready": "A model can be called"}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


class Application(FastAPI):
    """FastAPI whose document has the relay's routes too."""

    def openapi(self) -> dict[str, Any]:
        """The document; made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            paths = document.setdefault("paths", {})
            for path, (summary, members, required) in _INFERENCE.items():
                paths[path] = {"post": _inference(summary, members, required)}
            for path, summary in _OWN.items():
                paths[path] = {"get": {"summary": summary, "responses": _responses("200", "503"), "security": []}}
            components = document.setdefault("components", {})
            components.setdefault("schemas", {})["Error"] = _ERROR
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        assert self.openapi_schema is not None
        return self.openapi_schema


def _inference(summary: str, members: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"model": _NOT_EMPTY, **members},
        "required": ["model", *required],
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": _responses("200", "400", "401", "403", "404", "413", "429", "502", "503", "504"),
    }


def _responses(*statuses: str) -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return {
        status: {"description": "Done."} if status == "200" else {"description": "An error.", **error}
        for status in statuses
    }

"""A request as OpenAI's Python client sends it, byte by byte."""

from __future__ import annotations


def chat_request(key: str, body: bytes) -> bytes:
    """Head and body of a chat completion. body: JSON."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n"
        b"Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nUser-Agent: OpenAI/Python 3.54.0\r\n"
        b"Content-Type: application/json\r\nAuthorization: Bearer %b\r\nX-Stainless-Lang: python\r\n"
        b"X-Stainless-Package-Version: 3.54.0\r\nX-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\n"
        b"X-Stainless-Runtime: CPython\r\nX-Stainless-Runtime-Version: 3.11.14\r\nX-Stainless-Async: false\r\n"
        b"x-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\nContent-Length: %d\r\n\r\n%b"
    ) % (key.encode(), len(body), body)

"""The certificate that clients meet: read once at the start, and again when the operator says so."""

from __future__ import annotations

import ssl
from pathlib import Path


class TlsError(Exception):
    """A certificate or key that cannot be used; the message says which and why."""


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer for HTTP/1.1. cert: PEM, the server's own first, then its chain. Raises TlsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load(context, cert, key)
    return context


def load(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Give a context its certificate; connections from then on use it. Raises TlsError."""
    for flag, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise TlsError(f"cannot read {flag} {path}: {error.strerror}") from error
        if b"-----BEGIN " not in text:
            raise TlsError(f"{flag} {path} is not PEM; convert it, e.g. with `openssl x509 -inform der`")
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        if reason == "KEY_VALUES_MISMATCH":
            raise TlsError(f"--tls-key {key} is not the key of --tls-cert {cert}; give the pair") from error
        raise TlsError(f"--tls-cert {cert} with --tls-key {key} cannot be used: {reason}") from error
    except _Encrypted as error:
        raise TlsError(f"--tls-key {key} is encrypted; give it without a passphrase, readable to this user") from error


def reload(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Read the files again. A pair that cannot be used changes nothing. Raises TlsError."""
    server_context(cert, key)
    load(context, cert, key)


class _Encrypted(Exception):
    pass


def _no_password() -> str:
    raise _Encrypted

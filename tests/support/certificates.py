"""Certificates for tests, by trustme."""

from __future__ import annotations

from pathlib import Path

import trustme


def write_certificate(folder: Path, name: str = "127.0.0.1") -> tuple[Path, Path]:
    """cert.pem and key.pem for this address in `folder`, another pair each time; clients trust cert.pem itself."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    authority = trustme.CA()
    issued = authority.issue_cert(name)
    issued.private_key_pem.write_to_path(str(key))
    cert.write_bytes(b"".join(part.bytes() for part in (*issued.cert_chain_pems, authority.cert_pem)))
    return cert, key

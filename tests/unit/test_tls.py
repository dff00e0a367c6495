"""Certificates that can be used, and the words for those that cannot."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from gateway import tls
from gateway.config import ConfigError, ServeConfig, load
from gateway.preflight import check_tls
from tests.support.certificates import write_certificate


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificate(tmp_path_factory.mktemp("pair"))


def test_a_good_pair_serves_tls_1_2_and_newer(pair: tuple[Path, Path]) -> None:
    context = tls.server_context(*pair)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    "fault, words",
    [
        ("absent", "cannot read --tls-key {key}: No such file"),
        ("der", "--tls-cert {cert} is not PEM"),
        ("other key", "--tls-key {key} is not the key of --tls-cert {cert}; give the pair"),
        ("passphrase", "--tls-key {key} is encrypted"),
        ("damaged", "--tls-cert {cert} with --tls-key {key} cannot be used: "),
    ],
)
def test_what_cannot_be_used_is_named(pair: tuple[Path, Path], tmp_path: Path, fault: str, words: str) -> None:
    cert, key = (tmp_path / path.name for path in pair)
    cert.write_bytes(pair[0].read_bytes())
    key.write_bytes(pair[1].read_bytes())
    if fault == "absent":
        key.unlink()
    elif fault == "der":
        cert.write_bytes(b"\x30\x82\x01")
    elif fault == "other key":
        (tmp_path / "other").mkdir()
        key.write_bytes(write_certificate(tmp_path / "other")[1].read_bytes())
    elif fault == "passphrase":
        encrypt = ["openssl", "pkey", "-in", str(pair[1]), "-aes256", "-passout", "pass:x", "-out", str(key)]
        subprocess.run(encrypt, check=True, capture_output=True)
    else:
        cert.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigError) as refused:
        check_tls(ServeConfig(tls_cert=cert, tls_key=key))
    assert str(refused.value).startswith(words.format(cert=cert, key=key))


def test_one_without_the_other() -> None:
    with pytest.raises(ConfigError, match="give both of --tls-cert and --tls-key, or neither"):
        load(None, {"tls_cert": "/a"})


def test_a_bad_pair_does_not_replace_a_good_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path)
    context = tls.server_context(cert, key)
    key.write_bytes(pair[1].read_bytes())
    with pytest.raises(tls.TlsError, match="is not the key of"):
        tls.reload(context, cert, key)
    cert.write_bytes(pair[0].read_bytes())
    tls.reload(context, cert, key)

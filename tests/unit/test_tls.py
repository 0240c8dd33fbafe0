"""The TLS context of a driver's settings: what is wrong is named by its setting, and nothing is weaker than was asked for."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trustme

from unibus.errors import ConfigError
from unibus.tls import TlsTable, client_context


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path | None]:
    authority = trustme.CA()
    made = authority.issue_cert("client")
    paths: dict[str, Path | None] = {name: tmp_path / name for name in ("ca_file", "cert_file", "key_file")}
    authority.cert_pem.write_to_path(str(paths["ca_file"]))
    made.cert_chain_pems[0].write_to_path(str(paths["cert_file"]))
    made.private_key_pem.write_to_path(str(paths["key_file"]))
    return paths


def context(files: dict[str, Path | None], scheme: str = "amqps", *, verify: bool = True) -> ssl.SSLContext | None:
    return client_context("rabbitmq", "amqps", scheme, TlsTable(**files, verify=verify))


def test_it_verifies_unless_told_otherwise(files: dict[str, Path | None]) -> None:
    strict, lax = context(files), context({}, verify=False)
    assert strict is not None
    assert lax is not None
    assert (strict.verify_mode, strict.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert (lax.verify_mode, lax.check_hostname) == (ssl.CERT_NONE, False)


def test_without_tls_there_is_none_and_settings_for_it_are_refused(files: dict[str, Path | None]) -> None:
    assert context({}, "amqp") is None
    for wrong in (files, {"ca_file": files["ca_file"]}):
        with pytest.raises(ConfigError, match="amqps://"):
            context(wrong, "amqp")
    with pytest.raises(ConfigError, match="verify"):
        context({}, "amqp", verify=False)


def test_errors_name_the_setting(files: dict[str, Path | None], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rabbitmq\.ca_file: no such file"):
        context({**files, "ca_file": tmp_path / "none"})
    with pytest.raises(ConfigError, match="beside it"):
        context({**files, "cert_file": None})
    with pytest.raises(ConfigError, match="can't be used"):
        context({**files, "cert_file": files["ca_file"], "key_file": files["cert_file"]})

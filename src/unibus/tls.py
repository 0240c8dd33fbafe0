"""The TLS context of a driver's settings, the same for every driver that makes its connections itself."""

from __future__ import annotations

import ssl
from pathlib import Path

from unibus.config_tables import DriverTable
from unibus.errors import ConfigError


class TlsTable(DriverTable):
    """The settings of TLS, in the table of a driver."""

    ca_file: Path | None = None  # default: the authorities that the machine trusts
    cert_file: Path | None = None
    key_file: Path | None = None
    verify: bool = True


def check_files(section: str, secure: str, scheme: str, given: TlsTable) -> bool:
    """Is the scheme the `secure` one? Raises ConfigError for settings that don't fit it, or files that are not there.

    `section`: the driver's table, for errors.
    """
    files = {"ca_file": given.ca_file, "cert_file": given.cert_file, "key_file": given.key_file}
    if scheme != secure:
        if any(files.values()) or not given.verify:
            raise ConfigError(f"{section}: ca_file, cert_file, key_file and verify need TLS; use {secure}:// in url")
        return False
    for key, path in files.items():
        if path is not None and not path.is_file():
            raise ConfigError(f"{section}.{key}: no such file")
    if given.key_file is not None and given.cert_file is None:
        raise ConfigError(f"{section}.key_file needs {section}.cert_file beside it")
    return True


def client_context(section: str, secure: str, scheme: str, given: TlsTable) -> ssl.SSLContext | None:
    """The context, or None where `scheme` is not `secure`. Reads files: not for the event loop. Raises ConfigError."""
    if not check_files(section, secure, scheme, given):
        return None
    try:
        context = ssl.create_default_context(cafile=given.ca_file)
        if given.cert_file is not None:
            context.load_cert_chain(given.cert_file, given.key_file)
    except OSError as exc:
        raise ConfigError(f"{section}: the TLS files can't be used: {exc.strerror or exc}") from exc
    if not given.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def check_ca_file(section: str, path: Path) -> None:
    """Raises ConfigError that names the setting unless certificates can be read there."""
    if not path.is_file():
        raise ConfigError(f"{section}.ca_file: no such file")
    try:
        ssl.create_default_context(cafile=path)
    except OSError as exc:
        raise ConfigError(f"{section}: the TLS files can't be used: {exc.strerror or exc}") from exc

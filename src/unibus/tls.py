"""The TLS context of a driver's settings, the same for every driver that makes its connections itself."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

from unibus.errors import ConfigError


def client_context(
    section: str, secure: str, scheme: str, files: Mapping[str, Path | None], *, verify: bool
) -> ssl.SSLContext | None:
    """The context, or None where `scheme` is not `secure`. Reads files: not for the event loop. Raises ConfigError.

    `section`: the driver's table, for errors. `files`: `ca_file`, `cert_file` and `key_file`.
    """
    ca_file, cert_file, key_file = (files.get(key) for key in ("ca_file", "cert_file", "key_file"))
    if scheme != secure:
        if any(files.values()) or not verify:
            raise ConfigError(f"{section}: ca_file, cert_file, key_file and verify need TLS; use {secure}:// in url")
        return None
    for key, path in files.items():
        if path is not None and not path.is_file():
            raise ConfigError(f"{section}.{key}: no such file")
    if key_file is not None and cert_file is None:
        raise ConfigError(f"{section}.key_file needs {section}.cert_file beside it")
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if cert_file is not None:
            context.load_cert_chain(cert_file, key_file)
    except OSError as exc:
        raise ConfigError(f"{section}: the TLS files can't be used: {exc.strerror or exc}") from exc
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context

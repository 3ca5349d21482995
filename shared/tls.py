"""TLS by setting: which certificates a service trusts, and the one that it shows.

Invariants: files are read once, at start, and one that cannot be used is a SettingsError that names its setting; names
in certificates are always checked; nothing older than TLS 1.2 is spoken.
"""

import ssl
from typing import Any

import msgspec

from shared.errors import SettingsError

REDIS_SCHEME = "rediss://"


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files, each empty when it is not configured."""

    ca: str = ""  # empty: the system's
    cert: str = ""  # and whatever signed it, up to the root
    key: str = ""

    def client(self) -> ssl.SSLContext:
        """For a connection that this service opens. Raises SettingsError."""
        context = ssl.create_default_context()
        if self.ca:
            context = ssl.create_default_context(cafile=_ca_file(self.ca))
        if self.cert or self.key:
            load_pair(context, self.cert, self.key, names=("tls_cert", "tls_key"))
        return context

    def server(self) -> ssl.SSLContext:
        """For connections of other services, which must show a certificate, too. Raises SettingsError."""
        if not self.ca:
            raise SettingsError("setting 'tls_ca': needed here, to tell the cluster's own services from others")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=_ca_file(self.ca))
        context.verify_mode = ssl.CERT_REQUIRED
        load_pair(context, self.cert, self.key, names=("tls_cert", "tls_key"))
        return context

    def redis_options(self, url: str) -> dict[str, Any]:
        """What redis-py wants to be told for this url; nothing for one without TLS. Raises SettingsError."""
        if not url.startswith(REDIS_SCHEME):
            return {}
        self.client()  # redis-py reads the files at the first connection, which is too late to refuse them
        return {
            "ssl_ca_certs": self.ca or None,
            "ssl_certfile": self.cert or None,
            "ssl_keyfile": self.key or None,
            "ssl_check_hostname": True,
        }


NO_TLS = Tls()


def load_pair(context: ssl.SSLContext, cert: str, key: str, *, names: tuple[str, str]) -> None:
    """Show this certificate. `names`: of the two settings. Raises SettingsError."""
    for path, name, other in ((cert, names[0], names[1]), (key, names[1], names[0])):
        if not path:
            raise SettingsError(f"missing setting {name!r}: it belongs to {other!r}")
        _readable(path, name)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        if "KEY_VALUES_MISMATCH" in str(error):
            raise SettingsError(f"setting {names[1]!r}: {key} is not the key of the certificate {cert}") from error
        raise SettingsError(
            f"setting {names[0]!r}: {cert} and {key} are not a certificate and its key, in PEM and without a password"
        ) from error


def _no_password() -> str:
    """Asked for an encrypted key; without an answer OpenSSL would ask the terminal."""
    return ""


def _ca_file(path: str) -> str:
    _readable(path, "tls_ca")
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError as error:
        raise SettingsError(f"setting 'tls_ca': {path} holds no certificate in PEM") from error
    return path


def _readable(path: str, name: str) -> None:
    try:
        with open(path, "rb"):  # noqa: PTH123 - the path is passed on as it stands
            pass
    except OSError as error:
        raise SettingsError(f"setting {name!r}: cannot read {path}: {error.strerror}") from error

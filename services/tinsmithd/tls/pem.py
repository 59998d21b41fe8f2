"""What the files of a certificate hold, with a sentence for each thing that can be wrong there."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith.replaced import state_of
from tinsmithd.config import ConfigError

if TYPE_CHECKING:
    from cryptography import x509

FILE_BYTES_MAX = 1024 * 1024
"""More is no certificate: a bundle of all public authorities has a quarter of it."""


@dataclass(frozen=True)
class Files:
    """The files of one certificate, and the settings that name them.

    Attributes:
        section: Of the settings, such as `training`.
        prefix: What their names begin with: `tls` or `cluster_tls`.
        certificate, key, authorities: The files; empty where there are none.
        authorities_key: Name of the setting of the last one, without its section.
    """

    section: str
    prefix: str
    certificate: str
    key: str
    authorities: str
    authorities_key: str

    @property
    def certificate_setting(self) -> str:
        """Name of the setting that names the certificate."""
        return f"{self.section}.{self.prefix}_certificate_file"

    @property
    def key_setting(self) -> str:
        """Name of the setting that names the key."""
        return f"{self.section}.{self.prefix}_key_file"

    @property
    def authorities_setting(self) -> str:
        """Name of the setting that names the authorities."""
        return f"{self.section}.{self.authorities_key}"

    def state(self) -> tuple[object, ...]:
        """Changes whenever a file does."""
        return state_of((self.certificate, self.key, self.authorities))


@dataclass(frozen=True, eq=False)
class Pems:
    """What the files of one certificate held when they were read.

    Attributes:
        chain: The certificate and those between it and its authority, PEM; may be empty.
        key: Its key, PEM.
        authorities: PEM; may be empty.
        expires: When the certificate does; None where there is none.
        names: What it is for: DNS names, IP addresses, URIs.
        for_clients: Whether clients may show it.
    """

    chain: bytes = b""
    key: bytes = field(default=b"", repr=False)
    authorities: bytes = b""
    expires: datetime.datetime | None = None
    names: Sequence[str] = ()
    for_clients: bool = True


def read(files: Files) -> Pems:
    """Read the files of a certificate.

    Raises:
        ConfigError: One cannot be read, or is not what it should be; the message names the setting.
    """
    authorities = b""
    if files.authorities:
        authorities = _bytes(files.authorities, files.authorities_setting)
        _certificates(authorities, files.authorities, files.authorities_setting)
    if not files.certificate:
        return Pems(authorities=authorities)
    chain = _bytes(files.certificate, files.certificate_setting)
    own = _certificates(chain, files.certificate, files.certificate_setting)[0]
    key = _bytes(files.key, files.key_setting)
    _check_key(key, own, files)
    _check_dates(own, files)
    return Pems(chain, key, authorities, own.not_valid_after_utc, _names(own), _is_for_clients(own))


def _bytes(name: str, setting: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read {name}: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{setting}: {name} has more than {FILE_BYTES_MAX} bytes")
    return data


def _certificates(data: bytes, name: str, setting: str) -> "Sequence[x509.Certificate]":
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        why = "there is no certificate in it (PEM)"
        if b"-----BEGIN CERTIFICATE-----" in data:
            why = "a certificate in it cannot be read"
        raise ConfigError(f"{setting}: {name}: {why}") from error


def _check_key(key: bytes, own: "x509.Certificate", files: Files) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    setting, where = files.key_setting, files.key
    try:
        loaded = load_pem_private_key(key, None)
    except TypeError as error:
        message = f"{setting}: {where}: it has a passphrase, which nobody here can type"
        raise ConfigError(message) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{setting}: {where}: there is no private key in it (PEM)") from error
    if not isinstance(loaded, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        kind = type(loaded).__name__.removesuffix("PrivateKey").strip("_")
        raise ConfigError(f"{setting}: {where}: gRPC takes RSA and ECDSA keys, it is {kind}")
    if loaded.public_key() != own.public_key():
        message = f"{where} is not the key of the first certificate in {files.certificate}"
        raise ConfigError(f"{setting}: {message}")


def _check_dates(own: "x509.Certificate", files: Files) -> None:
    now = datetime.datetime.now(datetime.UTC)
    begins, ends = own.not_valid_before_utc, own.not_valid_after_utc
    if not begins <= now <= ends:
        how = f"it expired on {ends}" if now > ends else f"it is good from {begins} on, it is {now}"
        raise ConfigError(f"{files.certificate_setting}: {files.certificate}: {how}")


def _names(own: "x509.Certificate") -> Sequence[str]:
    from cryptography import x509

    try:
        found = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    kinds = (x509.DNSName, x509.IPAddress, x509.UniformResourceIdentifier)
    return [str(name.value) for name in found if isinstance(name, kinds)]


def _is_for_clients(own: "x509.Certificate") -> bool:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID as Use

    try:
        uses = own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        return True
    return Use.CLIENT_AUTH in uses or Use.ANY_EXTENDED_KEY_USAGE in uses

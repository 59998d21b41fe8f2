"""An authority that nobody else knows, and a certificate of it: for a cluster on this machine.

The authority's key is in no file: once it has signed, it is gone, and can sign nothing else.
"""

import datetime
import ipaddress
import os
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinsmithd.config import ConfigError
from tinsmithd.files import private_folder
from tinsmithd.tls.pem import Files, read

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

LASTS_DAYS = 365
LEFT_DAYS_MIN = 30
"""With fewer days left at a start, others are made."""
CLOCKS_DIFFER = datetime.timedelta(hours=1)
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ThrownAway:
    """Where the files are.

    Attributes:
        ca_file: The authority.
        certificate_file, key_file: What it vouches for.
        roots_file: The authorities of this machine and that one: for a program that trusts one file
            alone, and should still reach what is outside.
    """

    ca_file: Path
    certificate_file: Path
    key_file: Path
    roots_file: Path


def throw_away(folder: Path, names: Sequence[str] = LOCAL_NAMES) -> ThrownAway:
    """Make a certificate, and the authority that vouches for it, unless the folder has them.

    What is there stays for as long as it is good for a month, so that a script which trusts it
    goes on over a restart.

    Args:
        folder: Becomes this user's alone.
        names: DNS names and IP addresses that it is for; servers and clients may show it.

    Raises:
        OSError: It cannot be written.
    """
    private_folder(folder)
    folder.chmod(0o700)
    made = ThrownAway(
        folder / "ca.pem", folder / "server.pem", folder / "server.key", folder / "roots.pem"
    )
    if not _are_good(made):
        authority = Authority("Tinsmith, on this machine")
        certificate, key = authority.issue(names)
        # The certificate last: without it the others do not count.
        _write(made.ca_file, authority.certificate_pem)
        _write(made.key_file, key)
        _write(made.certificate_file, certificate)
    _write(made.roots_file, _usual_roots() + made.ca_file.read_bytes())
    return made


def _usual_roots() -> bytes:
    """The authorities that this machine trusts, where OpenSSL has them in one file."""
    usual = ssl.get_default_verify_paths().cafile
    try:
        return Path(usual).read_bytes() + b"\n" if usual else b""
    except OSError:
        return b""


def _are_good(made: ThrownAway) -> bool:
    files = Files(
        "up", "tls", str(made.certificate_file), str(made.key_file), str(made.ca_file), "ca_file"
    )
    try:
        expires = read(files).expires
    except ConfigError:
        return False
    left = datetime.timedelta(days=LEFT_DAYS_MIN)
    return expires is not None and expires - datetime.datetime.now(datetime.UTC) > left


def _write(file: Path, content: bytes) -> None:
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as writing:
        writing.write(content)
    os.replace(part, file)


class Authority:
    """An authority of certificates, in memory alone.

    Args:
        name: What it is called.
    """

    def __init__(self, name: str) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = self._builder(
            self._name, self._key, now - CLOCKS_DIFFER, now + datetime.timedelta(days=LASTS_DAYS)
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        builder = builder.add_extension(_key_usage(signs=True), True)
        self._certificate = self._signed(builder)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's own certificate."""
        return _pem(self._certificate)

    def issue(
        self,
        names: Sequence[str],
        *,
        begins: datetime.datetime | None = None,
        ends: datetime.datetime | None = None,
    ) -> tuple[bytes, bytes]:
        """A certificate that servers and clients may show, and its key, both PEM.

        Args:
            names: DNS names, IP addresses, URIs.
            begins, ends: When it is good; None is now, and for a year.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID as Use

        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        builder = self._builder(
            x509.Name([]),
            key,
            begins or now - CLOCKS_DIFFER,
            ends or now + datetime.timedelta(days=LASTS_DAYS),
        )
        alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
        builder = builder.add_extension(alternatives, True)  # critical, as there is no subject
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        builder = builder.add_extension(_key_usage(signs=False), True)
        uses = x509.ExtendedKeyUsage([Use.SERVER_AUTH, Use.CLIENT_AUTH])
        signed = self._signed(builder.add_extension(uses, False))
        key_pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return _pem(signed), key_pem

    def _builder(
        self,
        subject: "x509.Name",
        key: "ec.EllipticCurvePrivateKey",
        begins: datetime.datetime,
        ends: datetime.datetime,
    ) -> "x509.CertificateBuilder":
        from cryptography import x509

        public, issuer = key.public_key(), self._key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), False)
        )

    def _signed(self, builder: "x509.CertificateBuilder") -> "x509.Certificate":
        from cryptography.hazmat.primitives import hashes

        return builder.sign(self._key, hashes.SHA256())


def _pem(certificate: "x509.Certificate") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _general_name(name: str) -> "x509.GeneralName":
    from cryptography import x509

    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, signs: bool) -> "x509.KeyUsage":
    from cryptography import x509

    uses: dict[str, Any] = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
            *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    uses["digital_signature"] = not signs
    uses["key_cert_sign"] = uses["crl_sign"] = signs
    return x509.KeyUsage(**uses)

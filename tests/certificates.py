"""Certificates for tests: an authority in memory, and files of what it vouches for."""

import datetime
import os
from pathlib import Path
from typing import Any

import grpc

from tinsmithd.tls.throwaway import LOCAL_NAMES, Authority

PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
EXPIRED: dict[str, Any] = {"begins": PAST, "ends": PAST + datetime.timedelta(days=1)}


class Issued:
    """A certificate in files, with its authority beside it.

    Args:
        folder: Where.
        authority: Vouches for it; None makes one.
        names: What it is for.
        lasts: As in `Authority.issue`.

    Attributes:
        certificate, key, ca: The files.
        authority: Who vouches for it.
    """

    def __init__(
        self,
        folder: Path,
        authority: Authority | None = None,
        names: tuple[str, ...] = LOCAL_NAMES,
        **lasts: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.authority = authority or Authority("tests")
        self.certificate, self.key = folder / "tls.crt", folder / "tls.key"
        self.ca = folder / "ca.crt"
        self.ca.write_bytes(self.authority.certificate_pem)
        self.renew(names, **lasts)

    def renew(self, names: tuple[str, ...] = LOCAL_NAMES, **lasts: Any) -> None:
        """Replace certificate and key, as cert-manager does."""
        certificate, key = self.authority.issue(names, **lasts)
        for file, content in ((self.key, key), (self.certificate, certificate)):
            part = file.with_suffix(".part")
            part.write_bytes(content)
            part.chmod(0o600)
            os.replace(part, file)

    def vouched_by(self, authority: Authority, names: tuple[str, ...] = LOCAL_NAMES) -> None:
        """Replace certificate, key and authority by those of another one."""
        self.authority = authority
        part = self.ca.with_suffix(".part")
        part.write_bytes(authority.certificate_pem)
        os.replace(part, self.ca)
        self.renew(names)

    def settings(self, prefix: str, ca: Path | None = None) -> dict[str, str]:
        """Settings of a process that uses it: `tls`, or `cluster_tls`, which has authorities."""
        found = {f"{prefix}_certificate_file": str(self.certificate)}
        found[f"{prefix}_key_file"] = str(self.key)
        if prefix == "cluster_tls":
            found["cluster_tls_ca_file"] = str(ca or self.ca)
        return found

    def credentials(self, shown: "Issued | None" = None) -> grpc.ChannelCredentials:
        """Credentials of a client that trusts its authority and shows another certificate."""
        key = certificate = None
        if shown is not None:
            key, certificate = shown.key.read_bytes(), shown.certificate.read_bytes()
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), key, certificate)

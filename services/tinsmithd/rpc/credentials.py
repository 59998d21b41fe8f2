"""Certificates as gRPC takes them; what is replaced on disk is taken with the next handshake."""

import grpc

from tinsmithd.tls import Certificates, Pems


def server_credentials(certificates: Certificates, *, asks: bool) -> grpc.ServerCredentials:
    """Credentials of a port.

    Args:
        certificates: What it shows.
        asks: Whether callers must show a certificate that its authorities vouch for.
    """
    handed = certificates.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        # In a thread of gRPC's, before each handshake. What is given here is parsed: None says that
        # nothing has changed.
        nonlocal handed
        now = certificates.current()
        if now is handed:
            return None
        handed = now
        return _configuration(now, asks=asks)

    first = _configuration(handed, asks=asks)
    return grpc.dynamic_ssl_server_credentials(first, changed, asks)  # type: ignore[arg-type]


def _configuration(pems: Pems, *, asks: bool) -> grpc.ServerCertificateConfiguration:
    authorities = pems.authorities if asks else None
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.chain)], authorities)


class ClientCredentials:
    """Credentials of the channels to the other servers of a cluster.

    Args:
        certificates: By what this process knows them, and they know it.
    """

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self._pems: Pems | None = None
        self._made: grpc.ChannelCredentials | None = None

    def current(self) -> grpc.ChannelCredentials:
        """Those of what the files hold now; the same object until that changes."""
        pems = self._certificates.current()
        if pems is not self._pems or self._made is None:
            self._pems = pems
            self._made = grpc.ssl_channel_credentials(
                pems.authorities, pems.key or None, pems.chain or None
            )
        return self._made

"""A certificate for what speaks TLS through Python's `ssl`: the gateway, and `/metrics`."""

import logging
import ssl
from typing import Any

from tinsmithd.config import ConfigError
from tinsmithd.tls.certificates import Certificates
from tinsmithd.tls.pem import Pems

_log = logging.getLogger(__name__)


class ServerContext:
    """The server's side of TLS; each handshake has the certificate of that moment.

    Args:
        certificates: What is shown.
        protocols: What is spoken in it, as ALPN names it.
        asks: Whether callers must show a certificate that its authorities vouch for, if it has any.

    Attributes:
        context: For whoever wraps a socket.

    Raises:
        ConfigError: OpenSSL does not take the files.
    """

    def __init__(
        self, certificates: Certificates, *, protocols: tuple[str, ...] = (), asks: bool = True
    ) -> None:
        self._certificates = certificates
        self._protocols = protocols
        self._asks = asks
        self._pems = certificates.current()
        try:
            self.context = self._current = self._make(self._pems)
        except OSError as error:
            setting, file = certificates.files.certificate_setting, certificates.files.certificate
            raise ConfigError(f"{setting}: OpenSSL does not take {file}: {error}") from error
        # It is called in every handshake, also in one that names no server.
        self.context.sni_callback = self._show

    def _show(self, handshake: Any, _name: str | None, _context: ssl.SSLContext) -> None:
        pems = self._certificates.current()
        if pems is not self._pems:
            self._pems = pems
            try:
                self._current = self._make(pems)
            except OSError as error:  # replaced once more since they were read, and read again soon
                _log.error("%s; what was there before stays in use", error)
        handshake.context = self._current

    def _make(self, pems: Pems) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # OpenSSL reads keys from files alone.
        context.load_cert_chain(self._certificates.files.certificate, self._certificates.files.key)
        if self._asks and pems.authorities:
            context.load_verify_locations(cadata=pems.authorities.decode("ascii", "replace"))
            context.verify_mode = ssl.CERT_REQUIRED
        if self._protocols:
            context.set_alpn_protocols(list(self._protocols))
        return context

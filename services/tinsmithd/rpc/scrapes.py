"""Answers Prometheus over HTTP, or HTTPS, in threads of their own."""

import errno
import socket
import threading
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from tinsmithd.tls import Certificates, ServerContext

SILENT_S_MAX = 30.0
"""A connection on which nothing comes for so long is closed; its thread ends."""


class _Handler(WSGIRequestHandler):
    timeout = SILENT_S_MAX

    def log_message(self, *_: Any) -> None:
        """Log nothing: scrapes come every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    context: ServerContext | None = None

    def get_request(self) -> Any:
        """Take a connection; its handshake is made in its own thread, when it is read from."""
        plain, peer = super().get_request()
        if self.context is None:
            return plain, peer
        return self.context.context.wrap_socket(
            plain, server_side=True, do_handshake_on_connect=False
        ), peer

    def handle_error(self, *_: Any) -> None:
        """Pass over what went wrong with one connection, such as somebody's handshake."""


class Scrapes:
    """What answers scrapes, from its construction until `close`.

    Args:
        address: host:port; port 0 takes a free one.
        registry: Has what is read.
        certificates: What is shown with TLS; None is plain text.

    Attributes:
        port: The port.

    Raises:
        ConfigError: OpenSSL does not take the certificate.
        OSError: The address cannot be bound.
    """

    def __init__(
        self, address: str, registry: CollectorRegistry, certificates: Certificates | None = None
    ) -> None:
        context = None
        if certificates is not None:
            context = ServerContext(certificates, protocols=("http/1.1",), asks=False)
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        kind = type("_Server", (_Server,), {"address_family": family, "context": context})
        try:
            self._server: WSGIServer = make_server(
                host, int(port), make_wsgi_app(registry), kind, handler_class=_Handler
            )
        except OSError as error:
            message = f"cannot listen on {address} for metrics: {error.strerror}"
            raise OSError(error.errno or errno.EADDRINUSE, message) from error
        self.port = int(self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

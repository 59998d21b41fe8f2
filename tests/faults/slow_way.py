"""A way to a server that can be made slow: bytes go through it at a given rate."""

import contextlib
import socket
import threading
import time

BUFFER_BYTES = 16 * 1024
"""Small, so that what is under way is seen to be."""


class SlowWay:
    """Forwards TCP connections to a port of this machine; a context manager.

    Args:
        port: Where to.

    Attributes:
        address: Where it listens, `host:port`.
        bytes_per_s: How much goes through in each direction of each connection; 0 for all there is.
        sent: Bytes that came for the server so far.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.bytes_per_s = 0
        self.sent = 0
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket()
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
                try:
                    server.connect(("127.0.0.1", self._port))
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
                for one, other in ((client, server), (server, client)):
                    pump = (one, other, one is client)
                    threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, to_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(BUFFER_BYTES):
                self.sent += len(data) * to_server
                target.sendall(data)
                if self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "SlowWay":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            end.close()

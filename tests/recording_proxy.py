"""An HTTP proxy for tests that refuses, and tells whom it was asked for."""

import socket
import threading


class RecordingProxy:
    """Takes connections, writes down what they ask for, and lets nothing through.

    Attributes:
        address: `host:port`.
        asked: The beginning of each request.
    """

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def targets(self) -> list[str]:
        """Whom each request was for."""
        return [request.decode("latin-1").split()[1] for request in self.asked]

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(1000))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    def __enter__(self) -> "RecordingProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

"""HTTP/2 by hand, for peers that a gRPC client cannot play: silent, half, or from another host."""

import contextlib
import socket
import struct
from collections.abc import Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
FRAME_BYTES = 16_384


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def headers(method: str) -> bytes:
    """The header block of a gRPC call: literals without a table."""
    pairs = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    block = b""
    for name, value in pairs:
        block += b"\x00" + bytes([len(name)]) + name.encode()
        block += _length(len(value)) + value.encode()
    return block


def _length(size: int) -> bytes:
    """An HPACK integer of seven bits in its first byte."""
    if size < 127:
        return bytes([size])
    rest, out = size - 127, b"\x7f"
    while rest >= 128:
        out += bytes([rest % 128 + 128])
        rest //= 128
    return out + bytes([rest])


class Peer:
    """One connection; a context manager.

    Args:
        address: `host:port` of the server.
        source: Loopback address that it comes from.
        window: Bytes of responses that the server may send on a stream.
    """

    def __init__(self, address: str, *, source: str = "127.0.0.1", window: int = 65_535) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection(
            (host, int(port)), timeout=30, source_address=(source, 0)
        )
        self._next_stream = 1
        settings = struct.pack("!HI", INITIAL_WINDOW_SIZE, window)
        self.socket.sendall(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(SETTINGS, ACK, 0))

    def open(self, method: str, body: bytes = b"", *, end: bool = False) -> int:
        """Begin a call with so much of its body; returns its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.socket.sendall(frame(HEADERS, END_HEADERS, stream, headers(method)))
        self.send(stream, body, end=end)
        return stream

    def send(self, stream: int, body: bytes, *, end: bool = False) -> None:
        """Send more of a call's body; as much as a window takes is the caller's affair."""
        for start in range(0, len(body), FRAME_BYTES):
            self.socket.sendall(frame(DATA, 0, stream, body[start : start + FRAME_BYTES]))
        if end:
            self.socket.sendall(frame(DATA, END_STREAM, stream))

    def frames(self, timeout_s: float = 5.0) -> Iterator[tuple[int, int, int, bytes]]:
        """Frames as they come, until nothing came for so long or the connection ended."""
        self.socket.settimeout(timeout_s)
        with contextlib.suppress(OSError):
            while len(head := self._exactly(9)) == 9:
                size = int.from_bytes(head[:3], "big")
                kind, flags, stream = struct.unpack("!BBI", head[3:])
                yield kind, flags, stream, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (more := self.socket.recv(size - len(data))):
            data += more
        return data

    def close(self) -> None:
        """End the connection."""
        self.socket.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def message(content: bytes) -> bytes:
    """A gRPC message as it stands in a body."""
    return b"\0" + struct.pack("!I", len(content)) + content

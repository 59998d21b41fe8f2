"""HTTP/2 by hand, for peers that a gRPC client cannot play: silent, half, or from another host."""

import contextlib
import socket
import struct
import time
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
        self._acknowledged = False
        self._first_window = 65_535
        self._windows = {0: 65_535}
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
            self._send_data(stream, body[start : start + FRAME_BYTES])
        if end:
            self.socket.sendall(frame(DATA, END_STREAM, stream))

    def _send_data(self, stream: int, data: bytes) -> None:
        self.socket.sendall(frame(DATA, 0, stream, data))
        for key in (stream, 0):
            self._windows[key] = self._windows.get(key, self._first_window) - len(data)

    def push(self, stream: int, nbytes: int, give_up_s: float = 5.0, content: bytes = b"") -> int:
        """Send so many more bytes, zeros or `content`, as far as windows allow; returns how many
        went out."""
        sent, end_s = 0, time.monotonic() + give_up_s
        while sent < nbytes and time.monotonic() < end_s:
            room = min(self._windows.get(stream, self._first_window), self._windows[0], FRAME_BYTES)
            if room > 0:
                size = min(room, nbytes - sent)
                self._send_data(stream, content[sent : sent + size] or bytes(size))
                sent += size
                continue
            self.socket.settimeout(max(0.01, end_s - time.monotonic()))
            try:
                self._take_frame()
            except OSError:
                break
        return sent

    def _take_frame(self) -> None:
        kind, flags, stream, payload = self._frame()
        if kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            self._windows[stream] = self._windows.get(stream, self._first_window) + more
        elif kind == SETTINGS and not flags & ACK:
            if self._acknowledged:  # the first was, before it came
                self.socket.sendall(frame(SETTINGS, ACK, 0))
            self._acknowledged = True
            for at in range(0, len(payload), 6):
                key, value = struct.unpack_from("!HI", payload, at)
                if key == INITIAL_WINDOW_SIZE:
                    change, self._first_window = value - self._first_window, value
                    for stream in self._windows:
                        self._windows[stream] += change if stream else 0
        elif kind == PING and not flags & ACK:
            self.socket.sendall(frame(PING, ACK, 0, payload))
        elif kind == RST_STREAM:
            raise OSError(f"stream {stream} was reset")

    def _frame(self) -> tuple[int, int, int, bytes]:
        head = self._exactly(9)
        if len(head) < 9:
            raise OSError("the connection ended")
        kind, flags, stream = struct.unpack("!BBI", head[3:])
        return kind, flags, stream, self._exactly(int.from_bytes(head[:3], "big"))

    def frames(self, timeout_s: float = 5.0) -> Iterator[tuple[int, int, int, bytes]]:
        """Frames as they come, until nothing came for so long or the connection ended."""
        self.socket.settimeout(timeout_s)
        with contextlib.suppress(OSError):
            while True:
                yield self._frame()

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

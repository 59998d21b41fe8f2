"""A TCP proxy that cuts connections, and counts what goes through it."""

import asyncio
import contextlib
import threading
from collections.abc import Callable


class CuttingProxy:
    """Forwards connections on a thread of its own; a context manager.

    Args:
        target: `host:port`.

    Attributes:
        address: Where it listens, `host:port`.
        sent: Bytes that went to the target.
        received: Bytes that came from it.
        cuts: How often connections were cut.
        cut_after: Called with `received` after each read; connections are cut where it is true.
        refuses: New connections are closed at once.
    """

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.address = ""
        self.sent = self.received = self.cuts = 0
        self.refuses = False
        self.cut_after: Callable[[int], bool] = lambda received: False

    def __enter__(self) -> "CuttingProxy":
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def cut(self) -> None:
        """Reset every connection, in both directions."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        self.cuts += 1
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.close()
            return
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                other_reader, other_writer = await asyncio.open_connection(self._host, self._port)
            except OSError:
                writer.close()  # as the target itself, which is not there
                raise
            self._writers |= {writer, other_writer}
            await asyncio.gather(
                self._pump(reader, other_writer, out=True),
                self._pump(other_reader, writer, out=False),
            )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, out: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(16 * 1024):
                if out:
                    self.sent += len(data)
                else:
                    self.received += len(data)
                    if self.cut_after(self.received):
                        writer.write(data)  # a reset could take from the client what it has
                        writer.close()
                        self._writers.discard(writer)
                        self._cut()
                        return
                writer.write(data)
                await writer.drain()
        writer.close()

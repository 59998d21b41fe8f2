"""What `tinsmith up` knows of the gateway: whether it can be started, where, and when it serves."""

import asyncio
import contextlib
import importlib.util
import socket
import ssl
from pathlib import Path

PORT = 8080
"""Its port where nobody says another one; if that is taken, a free one."""
_MODULES = ("starlette", "uvicorn", "httptools", "uvloop", "zstandard", "tokenizers", "jinja2")
"""What the extra `gateway` brings."""
_ANSWER_S_MAX = 5.0


def lacks() -> list[str]:
    """Modules of the extra `gateway` that are not installed."""
    return [name for name in _MODULES if importlib.util.find_spec(name) is None]


def is_free(port: int) -> bool:
    """Whether a port of this machine's loopback can be listened on."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


def loadable(folder: Path) -> str:
    """A folder's path as a stock SDK takes it for a tokenizer's.

    It cuts a name of three parts, `org/model/variant`, to two, and `/models/small` looks like one.
    """
    path = folder.as_posix()
    return f"/.{path}" if path.count("/") == 2 else path


async def is_ready(port: int, ca_file: Path | None = None) -> bool:
    """Whether a gateway on this machine serves, and its cluster with it.

    Args:
        port: Its port.
        ca_file: The authority that vouches for it; None where it speaks plain text.
    """
    context = ssl.create_default_context(cafile=ca_file) if ca_file else None
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(_ANSWER_S_MAX):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            try:
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")
                status = await reader.readline()
            finally:
                writer.close()
            return b" 200 " in status
    return False

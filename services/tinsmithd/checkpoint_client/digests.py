"""SHA-256 of files that come or go in pieces, made beside the loop that moves them."""

import asyncio
import hashlib
from collections.abc import Iterable

INLINE_BYTES_MAX = 64 * 1024
"""A piece up to this size is hashed at once: to call a thread would take as long."""


class Digests:
    """Digests of files, whose pieces are added in order.

    Args:
        names: Files that have a digest even if nothing of them is added.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._digests = {name: hashlib.sha256() for name in names}
        self._adding: asyncio.Future[None] | None = None

    async def add(self, name: str, data: bytes) -> None:
        """Add the next bytes of a file; returns when the piece before is hashed, not this one."""
        await self._settle()
        digest = self._digests.setdefault(name, hashlib.sha256())
        if len(data) <= INLINE_BYTES_MAX:
            digest.update(data)
        else:
            self._adding = asyncio.ensure_future(asyncio.to_thread(digest.update, data))

    async def all(self) -> dict[str, bytes]:
        """The digests of all that was added, by file."""
        await self._settle()
        return {name: digest.digest() for name, digest in self._digests.items()}

    async def _settle(self) -> None:
        adding, self._adding = self._adding, None
        if adding is not None:
            await adding

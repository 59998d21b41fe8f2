"""Downloads without a key: URLs that are signed and expire, and what is behind them.

`external_weights_urls` gives one URL for each file of a folder that PEFT or transformers reads; the
archive that SDKs up to 0.35 ask for is the same folder as a tar. A URL is for one content of one
checkpoint: a name that was overwritten since is refused. Nothing is held whole on its way.
"""

import tarfile
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from email.utils import format_datetime
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmith.checkpoints import OWN_FILES
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.domain import DEFAULT_OWNER
from tinsmithd.gateway.callers import act_for, part
from tinsmithd.gateway.problems import RETRY_S, Problem
from tinsmithd.gateway.tinker import paths
from tinsmithd.gateway.tinker.pieces import Pieces
from tinsmithd.gateway.tinker.room import Room
from tinsmithd.gateway.tinker.runs.catalogue import Catalogue
from tinsmithd.gateway.tinker.runs.changes import ONE, path_of
from tinsmithd.gateway.tinker.runs.files import FileStream, Slots
from tinsmithd.gateway.tinker.runs.signing import Signer, public_base

FILES = "/files/{run}/{kind}/{name}/{file}"
ARCHIVE = "checkpoint.tar"
COMPLETE = "checkpoint_complete"
"""An empty file that SDKs up to 0.35 look for in an archive."""
DOWNLOADS_MAX = 64


def routes(room: Room, catalogue: Catalogue) -> Sequence[BaseRoute]:
    """Routes of this module."""
    signer = Signer(room.settings)
    slots = Slots(DOWNLOADS_MAX)

    async def urls(request: Request) -> Response:
        path = path_of(request)
        if paths.split(path)[1] != "external_weights":
            message = "only external_weights have URLs: save them with save_weights_external"
            raise Problem(400, message, "INVALID_NAME", "checkpoint_id")
        found = await catalogue.checkpoint(path)
        expires = signer.expiry()
        named = {name: _url(request, room, signer, found, name, expires) for name in _files(found)}
        return JSONResponse({"urls": named, "expires": expires.isoformat()})

    async def archive(request: Request) -> Response:
        found = await catalogue.checkpoint(path_of(request))
        expires = signer.expiry()
        url = _url(request, room, signer, found, ARCHIVE, expires)
        headers = {"Location": url, "Expires": format_datetime(expires, usegmt=True)}
        body = {"url": url, "expires": expires.isoformat()}
        return JSONResponse(body, 302, headers)

    async def file(request: Request) -> Response:
        path, name = path_of(request), request.path_params["file"]
        digest, owner = signer.check(path, name, request.query_params)
        act_for(owner or DEFAULT_OWNER)
        found = await catalogue.checkpoint(path)
        if found.digest != digest:
            message = "the checkpoint was replaced since the URL was made; ask for another one"
            raise Problem(404, message, "CHECKPOINT_REPLACED")
        wanted = [each for each in found.files if each.name in _files(found)]
        if name != ARCHIVE:
            wanted = [each for each in wanted if each.name == name]
            if not wanted:
                raise Problem(404, f"the checkpoint has no file {name[:100]!r}")
        if not slots.take():
            raise Problem(503, "too many downloads at once", retry_after_s=RETRY_S)
        stream = FileStream(room.cluster, found, wanted)
        if name == ARCHIVE:
            body: AsyncIterator[bytes] = _tar(stream)
            size = _tar_bytes(wanted)
        else:
            body, size = stream.of(wanted[0]), wanted[0].size_bytes
        headers = {
            "content-length": str(size),
            "content-disposition": f'attachment; filename="{quote(name)}"',
            "cache-control": "private, no-store",
        }

        def ended() -> None:
            stream.close()
            slots.give_back()

        is_head = request.method == "HEAD"
        return Pieces(body, "application/octet-stream", headers, is_head=is_head, ended=ended)

    return [
        Route(f"{ONE}/external_weights_urls", urls),
        Route(f"{ONE}/archive", archive),
        Route(FILES, file),
    ]


def _files(found: pb.Checkpoint) -> Sequence[str]:
    """Names of the files that others read."""
    return [each.name for each in found.files if each.name not in OWN_FILES]


def _url(
    request: Request,
    room: Room,
    signer: Signer,
    found: pb.Checkpoint,
    name: str,
    expires: datetime,
) -> str:
    parts = "/".join(quote(part, safe="") for part in (*paths.split(found.checkpoint_path), name))
    owner = found.owner if part() else ""
    query = signer.query(found.checkpoint_path, name, found.digest, expires, owner)
    return f"{public_base(request, room.settings)}/api/v1/files/{parts}?{query}"


async def _tar(stream: FileStream) -> AsyncIterator[bytes]:
    for file in stream.files:
        yield _header(file.name, file.size_bytes)
        async for piece in stream.of(file):
            yield piece
        yield b"\0" * (-file.size_bytes % tarfile.BLOCKSIZE)
    yield _header(COMPLETE, 0)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    # PAX differs from plain USTAR only for a file of 8 GiB or more.
    return member.tobuf(tarfile.PAX_FORMAT)


def _tar_bytes(files: Sequence[pb.CheckpointFile]) -> int:
    block = tarfile.BLOCKSIZE
    whole = sum(
        len(_header(each.name, each.size_bytes)) + -(-each.size_bytes // block) * block
        for each in files
    )
    return whole + len(_header(COMPLETE, 0)) + 2 * block

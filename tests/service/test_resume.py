"""Long reads of checkpoints go on where they broke; what came before is not sent again."""

import asyncio
import io
import tarfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from checkpoint_server import Served
from checkpoints import PATH, blobs, files, messages
from cutting_proxy import CuttingProxy
from tinsmith import _loop
from tinsmith._connection import Connection
from tinsmith._download import download
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1 import training_service_pb2
from tinsmithd.checkpoint import servicer
from tinsmithd.checkpoint.segments import Piece, Segment, pieces_from
from tinsmithd.checkpoint.store import directory
from tinsmithd.checkpoint_client import CheckpointClient, Patience
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import Reason, Unavailable
from wire import reason_and_field

READ_BYTES = 1000
"""Small pieces, so that a stream can break between any two of them."""


class Resumed(Served):
    """A Checkpoint server with one checkpoint, and what a whole read and export of it give."""

    digest = b""

    async def save(self, seed: int, **header: object) -> None:
        written = await self.stub.WriteCheckpoint(messages(PATH, files(seed), **header))
        self.digest = written.checkpoint.digest

    async def read_from(self, offset: int = 0, digest: bytes | None = None) -> bytes:
        """The bytes of all files after each other; each piece is where it says."""
        digest = self.digest if digest is None else digest
        request = pb.ReadCheckpointRequest(
            checkpoint_path=PATH, offset=offset, checkpoint_digest=digest
        )
        found, starts = b"", {}
        async for response in self.stub.ReadCheckpoint(request):
            if response.HasField("checkpoint"):
                total = 0
                for file in response.checkpoint.files:
                    starts[file.name], total = total, total + file.size_bytes
            else:
                piece = response.piece
                assert starts[piece.file_name] + piece.offset == offset + len(found)
                found += piece.data
        return found

    async def export(self, offset: int = 0, digest: bytes | None = None) -> bytes:
        """The archive from an offset on."""
        digest = self.digest if digest is None else digest
        request = pb.ExportCheckpointRequest(
            checkpoint_path=PATH, offset=offset, checkpoint_digest=digest
        )
        found, size = b"", -1
        async for response in self.stub.ExportCheckpoint(request):
            if response.HasField("archive"):
                size = response.archive.size_bytes
                assert response.archive.checkpoint.digest == self.digest
            else:
                assert response.piece.offset == offset + len(found)
                found += response.piece.data
        assert offset + len(found) == size
        return found


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Resumed]:
    monkeypatch.setattr(directory, "READ_BYTES", READ_BYTES)
    async with Resumed.running(tmp_path / "data") as served:
        await served.save(0)
        yield served


@pytest.mark.parametrize("what", ["read_from", "export"])
async def test_a_read_goes_on_at_any_offset(served: Resumed, what: str) -> None:
    """Within a file, between two, at the very end: the rest, and nothing else."""
    get = getattr(served, what)
    whole = await get()
    sizes = [len(data) for _, data in sorted(files(0).items())]
    for offset in (1, 511, 512, sizes[0], sizes[0] + 1, len(whole) // 2, len(whole) - 1):
        assert await get(offset) == whole[offset:]
    assert await get(len(whole)) == b""


@pytest.mark.parametrize("what", ["read_from", "export"])
async def test_what_cannot_be_gone_on_with_is_refused(served: Resumed, what: str) -> None:
    """An offset beyond the end or without a digest, and other content under the name."""
    get = getattr(served, what)
    whole = await get()

    async def refusal(*asked: object) -> tuple[str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await get(*asked)
        return reason_and_field(error.value)

    assert await refusal(len(whole) + 1) == ("INVALID_FIELD", "offset")
    assert await refusal(-1) == ("INVALID_FIELD", "offset")
    assert await refusal(1, b"") == ("MISSING_FIELD", "checkpoint_digest")
    assert await refusal(1, b"x") == ("INVALID_FIELD", "checkpoint_digest")
    old = served.digest
    await served.save(1, overwrite=True)
    assert await refusal(1, old) == ("CHECKPOINT_REPLACED", "")
    assert await refusal(0, old) == ("CHECKPOINT_REPLACED", "")


async def test_the_first_half_of_a_file_is_verified_with_its_second(served: Resumed) -> None:
    """Damage before the offset is found, so that nobody joins two halves that do not fit."""
    (blob,) = (
        b
        for b in blobs(served.folder)
        if b.stat().st_size == max(each.stat().st_size for each in blobs(served.folder))
    )
    data = bytearray(blob.read_bytes())
    data[0] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    names = sorted(files(0))
    start = sum(
        len(files(0)[name])
        for name in names[: names.index(max(names, key=lambda name: len(files(0)[name])))]
    )
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.read_from(start + len(data) // 2)
    assert reason_and_field(error.value)[0] == "CHECKPOINT_CORRUPT"


async def download_cut_in_the_middle(
    served: Resumed, folder: Path, meanwhile: Callable[[], Awaitable[None]]
) -> None:
    """Download through a proxy that cuts once, between what has come and what has not, and lets
    nobody in until something was done."""
    size = len(await served.export())
    cut, came = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    with CuttingProxy(served.address) as proxy:

        def cut_after(received: int) -> bool:
            if proxy.refuses or cut.is_set() or received < size // 2:
                return False
            assert came.wait(30)
            proxy.refuses = True
            loop.call_soon_threadsafe(cut.set)
            return True

        proxy.cut_after = cut_after
        connection = Connection("127.0.0.1:1")
        found = training_service_pb2.GetCapabilitiesResponse(checkpoint_address=proxy.address)
        connection._capabilities = found  # where the Checkpoint server is; there is no other
        getting = download(connection, PATH, folder, lambda *_: came.set())
        done = asyncio.wrap_future(_loop.run(getting))
        await asyncio.wait_for(cut.wait(), 60)
        await meanwhile()
        proxy.refuses = False
        await asyncio.wait_for(done, 60)
        await asyncio.wrap_future(_loop.run(connection.close()))


def read_folder(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


async def unpacked(served: Resumed) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(await served.export())) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]


async def test_a_download_whose_connection_is_cut_goes_on(
    served: Resumed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are whole, and what had come was not asked for again."""
    asked = []

    def recorded(segments: Sequence[Segment], offset: int) -> Iterator[Piece]:
        asked.append(offset)
        return pieces_from(segments, offset)

    async def record() -> None:
        monkeypatch.setattr(servicer, "pieces_from", recorded)

    size = len(await served.export())
    await download_cut_in_the_middle(served, tmp_path / "got", record)
    assert 0 < asked[0] < size
    assert read_folder(tmp_path / "got") == await unpacked(served)


async def test_a_download_never_mixes_two_contents(served: Resumed, tmp_path: Path) -> None:
    """The name means something else when it goes on: that is what arrives, whole."""
    await download_cut_in_the_middle(
        served, tmp_path / "got", lambda: served.save(1, overwrite=True)
    )
    assert read_folder(tmp_path / "got") == await unpacked(served)


# --- other servers read so, too -------------------------------------------------------------------


async def read_through(
    proxy: CuttingProxy, patience: Patience, on_half: Callable[[], None]
) -> dict[str, bytes]:
    """What another server reads over the proxy; `on_half` is called once, at half of it."""
    client = CheckpointClient(proxy.address, patience)
    found: dict[str, bytes] = {}
    try:
        async with client.reader(CheckpointPath.parse(PATH)) as reader:
            half = reader.info.size_bytes // 2
            async for name, data in reader.pieces():
                found[name] = found.get(name, b"") + data
                if half and sum(map(len, found.values())) > half:
                    half = 0
                    on_half()
    finally:
        await client.close()
    return found


def cut_of(proxy: CuttingProxy, content: dict[str, bytes]) -> Callable[[], None]:
    """Cuts a read, once, when it is called; a quarter at least has not come by then, however quick
    everybody is."""
    size, cut = sum(map(len, content.values())), threading.Event()

    def cut_after(received: int) -> bool:
        return not proxy.cuts and received > size * 3 // 4 and cut.wait(60)

    proxy.cut_after = cut_after
    return cut.set


@pytest.fixture
async def large(served: Resumed, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Files that cannot all be on their way at once, 5 MB."""
    monkeypatch.setattr(directory, "READ_BYTES", 64 * 1024)
    content = files(3, columns=100_000)
    written = await served.stub.WriteCheckpoint(messages(PATH, content, overwrite=True))
    served.digest = written.checkpoint.digest
    return content


async def test_a_servers_read_goes_on_where_its_connection_was_cut(
    served: Resumed, large: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are whole, and what had come was not asked for again."""
    asked = []

    def recorded(segments: Sequence[Segment], offset: int) -> Iterator[Piece]:
        asked.append(offset)
        return pieces_from(segments, offset)

    monkeypatch.setattr(servicer, "pieces_from", recorded)
    with CuttingProxy(served.address) as proxy:
        assert await read_through(proxy, Patience(), cut_of(proxy, large)) == large
    size = sum(map(len, large.values()))
    first, *again = asked
    assert (first, len(again)) == (0, 1)
    assert size // 2 < again[0] < size


async def test_a_servers_read_never_mixes_two_contents(
    served: Resumed, large: dict[str, bytes]
) -> None:
    """The name means something else when it goes on: it fails, and is all of that when repeated."""
    replaced: list[asyncio.Task[None]] = []
    with CuttingProxy(served.address) as proxy:
        cut = cut_of(proxy, large)

        def replace() -> None:
            proxy.refuses = True
            cut()
            replaced.append(asyncio.create_task(replace_and_open()))

        async def replace_and_open() -> None:
            await served.save(1, overwrite=True)
            proxy.refuses = False

        with pytest.raises(Unavailable) as failure:
            await read_through(proxy, Patience(), replace)
        assert failure.value.reason is Reason.CHECKPOINT_UNAVAILABLE
        await replaced[0]
        assert await read_through(proxy, Patience(), lambda: None) == files(1)


async def test_a_servers_read_gives_up_when_nobody_comes_back(
    served: Resumed, large: dict[str, bytes]
) -> None:
    """Bounded by the patience for an answer, not by that for a stream."""

    def end() -> None:
        proxy.refuses = True
        cut()

    with CuttingProxy(served.address) as proxy:
        cut = cut_of(proxy, large)
        with pytest.raises(Unavailable) as failure:
            async with asyncio.timeout(60):
                await read_through(proxy, Patience(answer_s_max=0.5, stall_s_max=600), end)
        assert failure.value.reason is Reason.CHECKPOINT_UNAVAILABLE

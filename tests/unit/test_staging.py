"""States on their way: whole and in order, bounded, and without a trace."""

import asyncio
import random
from pathlib import Path

import pytest

from tinsmithd.domain import content_digest
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.training.models import staging as staging_module
from tinsmithd.training.models.staging import READ_BYTES, DiskStaged, DiskStaging, whole

FILES = {"b": random.Random(1).randbytes(2 * READ_BYTES + 9), "a": b"small", "empty": b""}


async def put_down(staged: DiskStaged, piece: int = READ_BYTES + 3) -> None:
    """Write all files in pieces, none of which ends where one that is read does."""
    for name, data in FILES.items():
        for start in range(0, max(len(data), 1), piece):
            await asyncio.sleep(0)
            await staged.write(name, data[start : start + piece])
    staged.complete()


@pytest.mark.parametrize("memory_bytes", [0, READ_BYTES + 7, 1 << 30])
async def test_what_is_put_down_comes_back_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    """From memory, from the disk, and from both; twice, too; nothing of it is ever seen in the
    folder."""
    monkeypatch.setattr(staging_module, "MEMORY_BYTES_MAX", memory_bytes)
    staging = DiskStaging(tmp_path / "staged", 10**9)
    async with staging.open() as staged:
        await put_down(staged, 1000_003)
        for _ in range(2):
            pieces = await whole(staged)
            found = {name: b"".join(data for of, data in pieces if of == name) for name in FILES}
            assert found == FILES
            assert list(dict.fromkeys(name for name, _ in pieces)) == list(FILES)
        assert list((tmp_path / "staged").iterdir()) == []
        assert staging.nbytes == sum(map(len, FILES.values()))
        assert staging.memory_nbytes <= memory_bytes
    assert staging.nbytes == staging.memory_nbytes == 0


async def test_a_state_goes_on_while_it_comes_in(tmp_path: Path) -> None:
    """Whoever takes it has the first bytes before the last are there, and waits for those."""
    async with DiskStaging(tmp_path, 10**9).open() as staged:
        pieces = aiter(staged.pieces())
        await staged.write("a", b"first")
        assert await anext(pieces) == ("a", b"first")
        waiting = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await staged.write("a", b"second")
        assert await waiting == ("a", b"second")
        for data in (b"1", b"2"):
            await staged.write("b", data)
        staged.complete()
        assert [piece async for piece in pieces] == [("b", b"12")], "small ones go together"


async def test_states_on_their_way_are_bounded_together(tmp_path: Path) -> None:
    """One too many is refused and can be sent again; room comes back, whatever happened."""
    staging = DiskStaging(tmp_path, 100)
    async with staging.open() as one:
        await one.write("a", b"x" * 60)
        async with staging.open() as other:
            await other.write("a", b"x" * 30)
            with pytest.raises(ResourceExhausted) as refused:
                await other.write("a", b"x" * 30)
        assert refused.value.reason is Reason.STORAGE_FULL
        assert refused.value.retry_after_s
        assert refused.value.metadata["limit"] == "staged_bytes_max"
        assert staging.nbytes == 60
        await one.write("a", b"x" * 40)
    assert staging.nbytes == 0


async def test_a_folder_that_cannot_be_written_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceExhausted) as refused:
        async with DiskStaging(tmp_path / "file", 100).open():
            pass
    assert refused.value.reason is Reason.STORAGE_FULL


def test_a_content_digest_says_which_file_has_which_content() -> None:
    """Neither the order in which files are named nor where a name ends can be mistaken."""
    first, second = b"\1" * 32, b"\2" * 32
    digests = [
        content_digest(files)
        for files in (
            {"a": first, "b": second},
            {"a": second, "b": first},
            {"ab": first},
            {"a": first},
            {},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert content_digest({"b": second, "a": first}) == digests[0]

"""Files of a deposit are hashed while they are written, and what counts is what lies there."""

import asyncio
import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tinsmithd.checkpoint.store import Staging
from tinsmithd.checkpoint.store.directory import DirectoryStore
from tinsmithd.checkpoint.store.following import FOLLOWED_MAX, Following
from tinsmithd.errors import NotFound
from waiting import until

NAMES = ["weights", "moments"]
BYTES_MAX = 1 << 24
PARTS = [os.urandom(300_000) for _ in range(8)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DirectoryStore]:
    with closing(DirectoryStore(tmp_path)) as opened:
        yield opened


@pytest.fixture
def deposit(store: DirectoryStore, tmp_path: Path) -> Path:
    """The folder of one."""
    made = tmp_path / "deposits" / secrets.token_hex(16)
    made.mkdir(mode=0o700)
    return made


def followed(store: DirectoryStore, deposit: Path) -> Staging:
    staging = store.stage(BYTES_MAX)
    staging.follow(deposit.name, NAMES)
    return staging


def following_of(staging: Staging) -> Following | None:
    found: Following | None = staging._following  # type: ignore[attr-defined]
    return found


def read_of(staging: Staging, name: str) -> int:
    """How much of a file was read so far, bytes."""
    following = following_of(staging)
    assert following is not None
    begun = following._begun.get(name)
    return 0 if begun is None else begun.nbytes


def digests(staging: Staging) -> dict[str, str]:
    return {blob.name: blob.sha256 for blob in staging.finish(durable=False)}


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def followers() -> int:
    return sum(thread.name == "following" for thread in threading.enumerate())


async def test_all_that_is_written_bit_by_bit_counts_once(
    store: DirectoryStore, deposit: Path
) -> None:
    """Of both files, whatever of them was read before they were said to be complete."""
    staging = followed(store, deposit)
    for name in NAMES:
        written = 0
        with (deposit / name).open("wb", buffering=0) as file:
            for part in PARTS[:-1]:
                file.write(part)
                written += len(part)
                await until(lambda: read_of(staging, name) == written)  # noqa: B023
            file.write(PARTS[-1])
    for name in NAMES:
        assert staging.take(deposit.name, name) == sum(map(len, PARTS))
    assert digests(staging) == dict.fromkeys(NAMES, sha256(*PARTS))
    staging.discard()
    assert followers() == 0


def test_what_was_complete_before_anybody_looked_is_hashed_in_the_end(
    store: DirectoryStore, deposit: Path
) -> None:
    staging = store.stage(BYTES_MAX)
    for name in NAMES:
        (deposit / name).write_bytes(PARTS[0])
    staging.follow(deposit.name, NAMES)
    for name in NAMES:
        staging.take(deposit.name, name)
    assert digests(staging) == dict.fromkeys(NAMES, sha256(PARTS[0]))
    staging.discard()


async def test_another_file_under_the_same_name_has_its_own_digest(
    store: DirectoryStore, deposit: Path
) -> None:
    staging = followed(store, deposit)
    (deposit / "weights").write_bytes(PARTS[0])
    await until(lambda: read_of(staging, "weights") == len(PARTS[0]))
    (deposit / "other").write_bytes(PARTS[1])
    (deposit / "other").rename(deposit / "weights")
    staging.take(deposit.name, "weights")
    assert digests(staging) == {"weights": sha256(PARTS[1])}
    staging.discard()


async def test_no_link_is_followed(store: DirectoryStore, deposit: Path, tmp_path: Path) -> None:
    """Nor anything else that its writer alone did not write."""
    secret = tmp_path / "secret"
    secret.write_bytes(PARTS[0])
    (deposit / "weights").symlink_to(secret)
    os.mkfifo(deposit / "moments")
    staging = followed(store, deposit)
    await asyncio.sleep(0.05)
    assert read_of(staging, "weights") == read_of(staging, "moments") == 0
    with pytest.raises(NotFound):
        staging.take(deposit.name, "weights")
    staging.discard()


def test_few_are_followed_at_once_and_all_are_taken(store: DirectoryStore, tmp_path: Path) -> None:
    """A place is free again once a write ended, however it did."""
    stagings = []
    for _ in range(FOLLOWED_MAX + 1):
        folder = tmp_path / "deposits" / secrets.token_hex(16)
        folder.mkdir()
        stagings.append((folder, followed(store, folder)))
    assert followers() == FOLLOWED_MAX
    assert following_of(stagings[-1][1]) is None
    for folder, staging in stagings[1:]:
        (folder / "weights").write_bytes(PARTS[0])
        staging.take(folder.name, "weights")
        assert digests(staging) == {"weights": sha256(PARTS[0])}
        staging.discard()
    stagings[0][1].discard()
    assert followers() == 0
    for folder, _ in stagings[:FOLLOWED_MAX]:
        staging = followed(store, folder)
        assert following_of(staging) is not None
        staging.discard()


def test_where_no_thread_is_to_be_had_all_is_hashed_in_the_end(
    store: DirectoryStore, deposit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else's place is lost."""

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    for _ in range(FOLLOWED_MAX + 1):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none)
            staging = followed(store, deposit)
        assert following_of(staging) is None
        (deposit / "weights").write_bytes(PARTS[0])
        staging.take(deposit.name, "weights")
        assert digests(staging) == {"weights": sha256(PARTS[0])}
        staging.discard()
    staging = followed(store, deposit)
    assert following_of(staging) is not None
    staging.discard()

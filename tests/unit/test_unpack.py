"""An archive from a server is unpacked as plain files beside each other, or not at all."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from tinsmith._download import _unpack
from tinsmith.errors import InvalidArgumentError


def archive_of(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def unpack(archive: bytes, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    _unpack(io.BytesIO(archive), folder)


def file(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = 3
    return member


def test_files_of_the_same_name_are_replaced(tmp_path: Path) -> None:
    target = tmp_path / "new"
    unpack(archive_of(file("a.json"), file("b.safetensors")), target)
    (target / "a.json").write_text("old")
    unpack(archive_of(file("a.json")), target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "a.json": "xxx",
        "b.safetensors": "xxx",
    }


@pytest.mark.parametrize("name", ["../up", "/tmp/x", "a/b", "..", "."])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    target = tmp_path / "new"
    with pytest.raises(InvalidArgumentError, match="no plain file"):
        unpack(archive_of(file("good"), file(name)), target)
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("link")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(InvalidArgumentError, match="link, which is no plain file"):
        unpack(archive_of(member), tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_what_would_grow_when_unpacked_is_refused(tmp_path: Path) -> None:
    """A packed archive, whatever it packs, and a file that is mostly holes."""
    with pytest.raises(tarfile.ReadError):
        unpack(gzip.compress(archive_of(file("a.json"))), tmp_path / "new")
    sparse = tarfile.TarInfo("a.json")
    sparse.pax_headers = {"GNU.sparse.map": "0,3", "GNU.sparse.size": str(1 << 40)}
    sparse.size = 3
    with pytest.raises(InvalidArgumentError, match="no plain file"):
        unpack(archive_of(sparse), tmp_path / "new")
    assert not list(tmp_path.rglob("*.json"))

"""Files of checkpoints that are read where they lie, or not at all."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from checkpoints import PATH, TimedKeeper, blobs, files, keep
from tinsmithd.checkpoint_client import LocalFiles
from tinsmithd.errors import DataLoss, Reason


def refuse(files: Mapping[str, bytes]) -> None:
    raise DataLoss("no such state", Reason.CHECKPOINT_CORRUPT)


def test_files_are_read_by_what_they_hold_and_only_whole(tmp_path: Path) -> None:
    """One that is too long or elsewhere is not there; one that is damaged is not proven."""
    timed = TimedKeeper(tmp_path)
    content = files(1, optimizer=False)
    keep(timed.keeper, content, PATH.replace("weights", "sampler_weights"))
    wanted = {name: hashlib.sha256(data).digest() for name, data in content.items()}
    size = sum(map(len, content.values()))
    local = LocalFiles(tmp_path)
    found = local.read(wanted, size, dict)
    assert found is not None
    assert found.content == content
    assert found.proof.result()
    assert local.read(wanted, size - 1, dict) is None
    assert local.read({}, size, dict) is None
    assert LocalFiles(tmp_path / "elsewhere").read(wanted, size, dict) is None
    with pytest.raises(DataLoss):
        local.read(wanted, size, refuse)
    damaged = blobs(tmp_path)[0]
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    found = local.read(wanted, size, dict)
    assert found is not None
    assert not found.proof.result(), "what was made of it is nothing that may be used"
    assert local.read(wanted, size, refuse) is None, "other bytes say nothing of the checkpoint"
    damaged.unlink()
    assert local.read(wanted, size, dict) is None
    timed.keeper.close()

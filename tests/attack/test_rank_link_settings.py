"""The rank link: settings that would leave it open, and secrets that are wrong or absent."""

import os
from pathlib import Path

import pytest

from faults.processes import Process, Training
from programs import Ended
from tinsmithd.rpc import link_secret


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"link_address": "0.0.0.0:0"}, "training.link_secret_file: must be set"),
        ({"link_secret_file": "absent"}, "training.link_secret_file: cannot read"),
        ({"link_secret_file": "short"}, "training.link_secret_file: "),
        ({"link_secret_file": "binary"}, "only visible ASCII"),
    ],
)
def test_a_link_that_would_be_open_does_not_start(
    tmp_path: Path, settings: dict[str, str], says: str
) -> None:
    """One line that names the setting; nothing listens and no journal is claimed."""
    (tmp_path / "short").write_text("x" * 31 + "\n")
    (tmp_path / "binary").write_bytes(b"x" * 40 + b"\xc3\xa4")
    if "link_secret_file" in settings:
        settings = {"link_secret_file": str(tmp_path / settings["link_secret_file"])}
    with pytest.raises(Ended, match=says):
        Process("training", tmp_path, {"data_folder": tmp_path / "data", **settings})
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["", "absent"])
def test_a_rank_without_the_secret_says_so(tmp_path: Path, name: str) -> None:
    """One line that names the setting, before the base model is loaded; a restart cannot help."""
    settings = {"base_model": tmp_path, "link_secret_file": tmp_path / name if name else ""}
    rank = Process("trainer", tmp_path, settings)
    assert rank.wait() == 78
    assert rank.says("trainer.link_secret_file: ")
    assert not rank.says("Traceback")


def test_a_wrong_secret_is_said_at_both_ends(tiny_model: Path, tmp_path: Path) -> None:
    """The rank goes on trying, and attaches once it has the right one."""
    secret = tmp_path / "secret"
    secret.write_text("0" * 64)
    with Training(tiny_model, tmp_path, durability="none") as running:
        rank = running.start_rank(engine="reference", link_secret_file=secret)
        rank.until(lambda: rank.says("ERROR the stream to the Training server"))
        assert rank.says("UNAUTHENTICATED: this port is for the ranks of the cluster")
        assert running.server.says("wrong secret, or none (trainer.link_secret_file)")
        right = (running.data / link_secret.FILE_NAME).read_text()
        part = tmp_path / "part"
        part.write_text(right)
        os.replace(part, secret)
        rank.until(lambda: running.server.says("rank group attached"))

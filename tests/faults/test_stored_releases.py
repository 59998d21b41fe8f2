"""What each release wrote: today's servers go on from it, and give what that release gave."""

from pathlib import Path
from typing import Any

import pytest

import tinsmith
from releases import recorded
from releases.code import NEW
from releases.mixed import Mixed
from tinsmithd.keys import KeyFile
from tinsmithd.training.journal.sqlite_format import JOURNAL

KINDS = ("checkpoint", "trainer", "training")


@pytest.mark.parametrize("release", recorded.releases())
def test_the_data_of_a_release_go_on(release: str, tmp_path: Path) -> None:
    """Its models come back with pending gradients, its accepted calls are made, also the one that
    waited for a number, and its checkpoints load; all bits are those of that release where the
    processor is the one that recorded them."""
    expected = recorded.unpack(release, tmp_path)
    same_processor = expected["processor"] == recorded.processor()

    def check(found: Any, wanted: Any) -> None:
        assert found == wanted if same_processor else recorded.close(found, wanted)

    after = expected["after"]
    with Mixed(tmp_path / recorded.BASE, tmp_path, KINDS, **recorded.SETTINGS) as cluster:
        cluster.start(NEW)
        at = cluster.addresses["training"]
        with recorded.Raw(at, expected["model_id"]) as raw:
            seq_id = expected["next_seq_id"]
            check(raw.answer(seq_id - 1), expected["last_answer"])
            check(raw.answer(seq_id), after[0])
            check(raw.step(seq_id + 1), after[1])
            check(raw.answer(seq_id + 2), after[2])
            check(raw.step(seq_id + 3), after[3])
        service = tinsmith.ServiceClient(base_url=at)
        model = service.get_training_client(expected["model_id"]).result(60)
        for found, wanted in zip(
            recorded.from_checkpoint(model, expected["path"]), expected["loaded"], strict=True
        ):
            check(found, wanted)
        kept = list((tmp_path / "data" / "training").glob("journal.format-*.sqlite"))
        assert bool(kept) == (JOURNAL.known > 1)
    assert [key.tenant for key in KeyFile(tmp_path / "keys.json").list()] == ["alice"]

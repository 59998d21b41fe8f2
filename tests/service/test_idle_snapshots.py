"""A model that falls idle is on disk as it is, so that nothing is replayed when it comes back."""

import contextlib
import json
from functools import partial
from pathlib import Path

from recorded_cluster import data_of, recorded_cluster
from tinsmithd.modeling.base import load_base
from tinsmithd.trainer.engines.reference import ReferenceEngine
from waiting import until


def is_on_disk(folder: Path, step_count: int) -> bool:
    """Whether a data folder has a snapshot of a model that made so many steps."""
    found = []
    for file in folder.glob("snapshots/*/manifest.json"):
        with contextlib.suppress(FileNotFoundError):  # it made room for a newer one meanwhile
            found.append(json.loads(json.loads(file.read_text())["manifest"])["step_count"])
    return step_count in found


async def test_a_model_that_falls_idle_has_a_snapshot_of_its_last_step(tiny_model: Path) -> None:
    """Although none is due by steps, and with gradients that wait: those are computed again."""
    engine = ReferenceEngine(load_base(str(tiny_model), dtype="float32", on_progress=print))
    settings = {"durability": "async", "snapshot_idle_s": 0.1, "snapshot_steps": 1000}
    async with recorded_cluster(engine, 1000, **settings) as recorded:
        recorded.rank.go.set()
        model_id, data = await recorded.create(), data_of(1, 2, 8)
        for step in (1, 2):
            await recorded.compute(model_id, 3 * step - 2, data)
            await recorded.step(model_id, 3 * step - 1)
            await recorded.compute(model_id, 3 * step, data)
            await until(partial(is_on_disk, recorded.folder, step))

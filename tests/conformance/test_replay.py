"""Batches that are computed again from a saved state, in a new process: the same bits."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from replay_worker import CASES

import programs

pytestmark = pytest.mark.timeout(300)

EVERY = [(ranks, case) for ranks, cases in CASES.items() for case in cases]


def run(folder: Path, ranks: int, what: str, out: Path, *cases: str) -> None:
    arguments = (what, str(folder), str(out), *cases)
    done = programs.run("replay_worker", *arguments, ranks=ranks if ranks > 1 else 0, forked=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per number of ranks, in it one per case with what each process computed."""
    out = tmp_path_factory.mktemp("replay")
    for ranks, cases in CASES.items():
        for case in cases:
            (out / str(ranks) / case).mkdir(parents=True)
        for what in ("record", "replay"):
            run(tiny_model, ranks, what, out / str(ranks), *cases)
    return out


def arrays(path: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in np.load(path).items()}


@pytest.mark.parametrize(("ranks", "case"), EVERY)
def test_a_repeated_call_gives_the_same_bits(results: Path, ranks: int, case: str) -> None:
    """Logprobs, losses, norms, weights and moments; whatever else the engine does, and with other
    settings of everything that may not change a number."""
    recorded, replayed = (
        arrays(results / str(ranks) / case / f"{name}.npz") for name in ("recorded", "replayed")
    )
    assert recorded.keys() == replayed.keys()
    assert [name for name in recorded if recorded[name] != replayed[name]] == []


def test_another_composition_gives_other_bits(results: Path) -> None:
    """Without them, and with other settings, it is not the same: the test above can fail."""
    recorded, free = (arrays(results / "1" / "stage-0" / f"{n}.npz") for n in ("recorded", "free"))
    assert recorded.keys() == free.keys()
    assert recorded != free


@pytest.mark.parametrize(("ranks", "case"), [(1, "stage-1-split"), (2, "stage-1-split")])
def test_a_plan_has_what_memory_split(results: Path, ranks: int, case: str) -> None:
    """On the rank where nothing fitted each datum is alone, on the other one they are together."""
    composition = read_compositions(results / str(ranks) / case)[0]
    assert composition["ranks"] == ranks
    sizes = [
        [[len(indices) for _, indices in of_rank] for of_rank in r] for r in composition["rounds"]
    ]
    assert all(size == 1 for round_ in sizes for size in round_[-1])
    assert any(len(round_[-1]) > 1 for round_ in sizes)
    if ranks == 2:
        assert any(size > 1 for round_ in sizes for size in round_[0])


@pytest.mark.parametrize(("ranks", "case"), [(1, "stage-1-recomputed"), (2, "stage-3-recomputed")])
def test_a_plan_has_what_was_recomputed(results: Path, ranks: int, case: str) -> None:
    """All of what has a way back, nothing of what has none."""
    compositions = read_compositions(results / str(ranks) / case)
    recomputed = [
        {again for round_ in composition["rounds"] for of_rank in round_ for again, *_ in of_rank}
        for composition in compositions
    ]
    assert recomputed == [{1}, {0}, {1}, {1}, {1}]


@pytest.mark.parametrize("case", ["stage-1-spread", "stage-3-spread"])
def test_a_plan_has_what_ranks_computed_together(results: Path, case: str) -> None:
    """Over how many ranks a datum is spread; engines that spread none by themselves repeat it."""
    alone = read_compositions(results / "2" / case)[3]
    assert alone["rounds"] == [[[[int(case == "stage-3-spread"), [0], 2]], []]]


def read_compositions(folder: Path) -> list[dict]:
    texts = json.loads((folder / "compositions.json").read_text())
    return [json.loads(base64.b64decode(text)) for text in texts]

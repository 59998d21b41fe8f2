"""One rank of `test_replay`: computes batches, or computes them again in a new process.

Arguments: `record` or `replay`; model folder; folder for what one process leaves to the next; names
of cases.

In the process that repeats them the engine has other settings, other models come in between, and
the model begins with the state that the first process saved midway. Rank 0 leaves everything that
came out.
"""

import base64
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import to_files
from data import begin_alike, make_data, make_rl_data
from engines import make_engine
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, FullConfig, LoraConfig, LossFn
from tinsmithd.errors import FailedPrecondition, Reason, ResourceExhausted
from tinsmithd.loss_fns import Ppo
from tinsmithd.state import files as state_files
from tinsmithd.trainer.engines.deepspeed import batch_run
from tinsmithd.trainer.engines.interface import Batch, ForwardResult, TrainingEngine
from tinsmithd.trainer.process_group import distributed

RECORDED = {"micro_batch_tokens_max": 30, "activation_bytes_max": 10**12}
REPLAYED = {
    "micro_batch_tokens_max": 7,
    "activation_bytes_max": 10**11,
    "resident_models_max": 1,
    "gathered_bytes_max": 1 << 30,
}
"""None of these may change a number."""

COMPOSITIONS = "compositions.json"


@dataclass(frozen=True)
class Case:
    """Settings of an engine that numbers depend on, and what happens.

    Attributes:
        settings: Of the engine.
        recorded: More settings of the first process.
        splits_on: The rank on which micro-batches of several data do not fit into memory; -1: none.
        more: Whether the second process also tries what fails on one rank only, and repeats
            everything without compositions, which is not the same.
        full: Train all weights.
    """

    settings: Mapping[str, Any]
    recorded: Mapping[str, Any] | None = None
    splits_on: int = -1
    more: bool = False
    full: bool = False


_RECOMPUTED = {"activation_bytes_max": 1}
_SPREAD = {"sequence_parallel": 2, "micro_batch_tokens_max": 4}
CASES: Mapping[int, Mapping[str, Case]] = {
    1: {
        "reference": Case({"name": "reference", "zero_stage": 0}),
        "stage-0": Case({"zero_stage": 0}, more=True),
        "stage-1-split": Case({"zero_stage": 1}, splits_on=0),
        "stage-1-recomputed": Case({"zero_stage": 1}, recorded=_RECOMPUTED),
        "stage-3": Case({"zero_stage": 3}),
        "full-stage-1": Case({"zero_stage": 1}, full=True),
        "full-stage-3": Case({"zero_stage": 3}, full=True),
    },
    2: {
        "stage-1": Case({"zero_stage": 1}, more=True),
        "stage-1-split": Case({"zero_stage": 1}, splits_on=1),
        "stage-3-recomputed": Case({"zero_stage": 3}, recorded=_RECOMPUTED),
        "stage-1-spread": Case({"zero_stage": 1}, recorded=_SPREAD),
        "stage-3-spread": Case({"zero_stage": 3}, recorded={**_SPREAD, **_RECOMPUTED}),
    },
}
"""By number of ranks."""

ALIKE = [*make_data(0, 2), *begin_alike(3, make_data(3, 5), 17)]
"""Several of them begin alike, and what they begin with is computed once."""
CALLS: Sequence[tuple[list[Datum], LossFn, bool]] = (
    (make_data(1, 9), CrossEntropy(), True),
    (make_data(2, 3), CrossEntropy(), False),
    (
        make_rl_data(3, ALIKE, [np.full(len(d.tokens), -5, np.float32) for d in ALIKE]),
        Ppo(),
        True,
    ),
    (make_data(4, 1), CrossEntropy(), True),
    (make_data(5, 7, targets=2), CrossEntropy(), True),
)
ADAM = AdamParams(learning_rate=1e-2, grad_clip_norm=20.0, weight_decay=0.1)


@contextmanager
def out_of_memory(on_rank: int, times: int = 10**6) -> Iterator[None]:
    """Let micro-batches of several data fail on one rank, half computed, so many times."""
    real, left = batch_run.compute_packed, times

    def compute(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        found = real(*args, **kwargs)
        if distributed.rank_and_world_size()[0] == on_rank and len(args[3]) > 1 and left:
            left -= 1
            raise MemoryError("no memory is left")
        return found

    batch_run.compute_packed = compute
    try:
        yield
    finally:
        batch_run.compute_packed = real


def start(case: Case, folder: str, **settings: Any) -> TrainingEngine:
    chosen = {"name": "deepspeed", **settings, **case.settings}
    return make_engine(base_model=folder, dtype="float32", on_progress=lambda _: None, **chosen)


def forward(
    engine: TrainingEngine, index: int, composition: bytes, found: dict[str, np.ndarray]
) -> ForwardResult:
    """One call; what came out goes to `found`."""
    data, loss_fn, backward = CALLS[index]
    logprobs: list[np.ndarray] = []
    result = engine.forward(
        Batch("m", data, loss_fn, backward=backward, composition=composition),
        lambda _, outputs: logprobs.append(outputs["logprobs"].reshape(-1)),
    )
    found[f"{index} loss"] = np.array(result.metrics["loss:sum"])
    found[f"{index} logprobs"] = np.concatenate(logprobs)
    assert not result.non_finite
    return result


def step(engine: TrainingEngine, index: int, found: dict[str, np.ndarray]) -> None:
    found[f"{index} norm"] = np.array(engine.optim_step("m", ADAM)["grad_norm:last"])


def leave(engine: TrainingEngine, found: dict[str, np.ndarray], path: Path) -> None:
    state = engine.export_state("m", optimizer=True)
    found |= {f"weight {name}": array for name, array in state.weights.items()}
    found |= {f"moment {name}": array for name, array in state.optimizer.items()}
    if distributed.rank_and_world_size()[0] == 0:
        np.savez(path, **found)


def record(case: Case, folder: str, out: Path) -> None:
    """Two steps, a saved state, then the calls with a step after each second one."""
    engine = start(case, folder, **{**RECORDED, **(case.recorded or {})})
    engine.create_model("m", FullConfig() if case.full else LoraConfig(rank=4, seed=7))
    for index in (0, 3):
        forward(engine, index, b"", {})
        engine.optim_step("m", ADAM)
    for name, data in to_files(engine.export_state("m", optimizer=True)).items():
        if distributed.rank_and_world_size()[0] == 0:
            (out / name).write_bytes(data)
    found: dict[str, np.ndarray] = {}
    compositions = []
    with out_of_memory(case.splits_on):
        for index in range(len(CALLS)):
            compositions.append(forward(engine, index, b"", found).composition)
            if index % 2:
                step(engine, index, found)
        step(engine, len(CALLS), found)
    leave(engine, found, out / "recorded.npz")
    if distributed.rank_and_world_size()[0] == 0:
        (out / COMPOSITIONS).write_text(
            json.dumps([base64.b64encode(p).decode() for p in compositions])
        )


def replay(case: Case, folder: str, out: Path) -> None:
    """The same calls from the saved state on, in an engine that does other things, too."""
    engine = start(case, folder, **REPLAYED)
    if not case.full:
        engine.create_model("other", LoraConfig(rank=4, seed=8))
        engine.create_model("another", LoraConfig(rank=2, seed=9, train_unembed=False))
    kept = {path.name for path in out.iterdir() if path.suffix in (".json", ".safetensors")}
    names = kept - {COMPOSITIONS}
    state = state_files.from_files({name: (out / name).read_bytes() for name in names}, None)
    engine.create_model("m", state.tuning)
    compositions = [base64.b64decode(text) for text in json.loads((out / COMPOSITIONS).read_text())]
    if case.more:
        infinite(engine)
    engine.import_state("m", state, optimizer=True)
    if case.more:
        refused(engine, compositions[0])
    repeat(engine, compositions, out / "replayed.npz", beside=not case.full)
    if case.more:
        engine.import_state("m", state, optimizer=True)
        repeat(engine, [b""] * len(compositions), out / "free.npz", beside=False)


def repeat(
    engine: TrainingEngine, compositions: Sequence[bytes], path: Path, *, beside: bool
) -> None:
    found: dict[str, np.ndarray] = {}
    for index, composition in enumerate(compositions):
        if beside:
            busy(engine, index)
        again = forward(engine, index, composition, found).composition
        assert again == (composition or again)
        if index % 2:
            step(engine, index, found)
    step(engine, len(CALLS), found)
    leave(engine, found, path)


def busy(engine: TrainingEngine, index: int) -> None:
    """Other models, which take turns with ours on the device."""
    for model_id in ("other", "another"):
        engine.forward(
            Batch(model_id, make_data(index, 2), CrossEntropy(), backward=True), lambda *_: None
        )
        engine.optim_step(model_id, ADAM)


def refused(engine: TrainingEngine, composition: bytes) -> None:
    """Where a given micro-batch does not fit, the call fails everywhere and leaves nothing."""
    last_rank = distributed.rank_and_world_size()[1] - 1
    with pytest.raises(ResourceExhausted) as refusal, out_of_memory(last_rank, times=1):
        forward(engine, 0, composition, {})
    assert refusal.value.reason is Reason.OUT_OF_MEMORY


def infinite(engine: TrainingEngine) -> None:
    """Gradients that are not finite on the last rank: every rank says so."""
    data = sorted(make_data(6, 2), key=lambda datum: -len(datum.tokens))
    data[1].loss_fn_inputs["weights"][:] = np.float32(3e38)
    result = engine.forward(Batch("m", data, CrossEntropy(), backward=True), lambda *_: None)
    assert result.non_finite
    with pytest.raises(FailedPrecondition):
        engine.optim_step("m", ADAM)


def main() -> None:
    what, folder, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        case = CASES[distributed.rank_and_world_size()[1]][name]
        (record if what == "record" else replay)(case, folder, Path(out, name))
    distributed.close()


if __name__ == "__main__":
    main()

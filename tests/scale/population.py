"""Many models and checkpoints at rest, written by the code that writes them in production."""

import asyncio
import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from scale.engine import INFO, LORA, Idle, state
from tinsmithd.checkpoint.catalogue import Checkpoint, open_local
from tinsmithd.checkpoint.opening import CATALOGUE_FILE
from tinsmithd.checkpoint.store import Blob
from tinsmithd.domain import AdamParams, CheckpointKind, CheckpointPath
from tinsmithd.files import private_folder
from tinsmithd.owners import inner_id
from tinsmithd.state import files as state_files
from tinsmithd.training.call import CallKind, Composition, ComputeWork, StepWork, StoredAnswer
from tinsmithd.training.journal import (
    AddAnswer,
    AddCall,
    AddModel,
    AddSnapshot,
    AddStep,
    SqliteStore,
    StoredStep,
    Trim,
    Write,
)
from tinsmithd.training.models import DiskSnapshotStore, Model
from tinsmithd.training.models.snapshot_store import SnapshotDraft
from training_calls import CROSS_ENTROPY, datum

MODELS_AT_ONCE = 50
"""In one commit."""
CHECKPOINTS_AT_ONCE = 2000
BLOB_BYTES = 1_000_000
LARGE = "large"
"""A tenant with one model, of many checkpoints."""
MANY = "many"
"""That model's id."""


def owner(number: int, owners: int) -> str:
    """Whose the model or the checkpoint of this number is."""
    return f"tenant-{number % owners}"


def model_id(number: int) -> str:
    """Its id, as its owner says it."""
    return hashlib.sha256(f"model {number}".encode()).hexdigest()[:32]


# --- models -----------------------------------------------------------------------------------


def write_models(folder: Path, count: int, owners: int, calls: int) -> None:
    """A journal of models at rest, each with some calls whose answers are kept, and a snapshot.

    Args:
        folder: The Training server's data folder.
        count: Number of models.
        owners: Number of tenants that have them.
        calls: Calls of each, a step after every other one.
    """
    asyncio.run(_write_models(folder, count, owners, calls))


async def _write_models(folder: Path, count: int, owners: int, calls: int) -> None:
    store = SqliteStore(folder, sync=False)
    contents = await store.claim()
    snapshots = DiskSnapshotStore(folder / "snapshots")
    snapshots.epoch = contents.epoch
    pieces = list(state_files.to_pieces(state(calls // 2), 1 << 20))
    first = len(contents.models)
    for start in range(first, first + count, MODELS_AT_ONCE):
        writes: list[Write] = []
        numbers = range(start, min(start + MODELS_AT_ONCE, first + count))
        ids = [inner_id(owner(number, owners), model_id(number)) for number in numbers]
        drafts = [snapshots.begin(each, calls) for each in ids]
        folders = await asyncio.gather(*(_finished(draft, pieces, calls // 2) for draft in drafts))
        for number, inner, made in zip(numbers, ids, folders, strict=True):
            writes += _model(number, inner, calls, made)
        await store.commit(writes)
        await store.tidy()
    await store.close()


async def _finished(draft: SnapshotDraft, pieces: list[tuple[str, bytes]], steps: int) -> str:
    for name, data in pieces:
        await draft.write(name, data)
    return await draft.finish(optimizer=True, step_count=steps)


def _model(number: int, inner: str, calls: int, folder: str) -> Iterator[Write]:
    made = Model(inner, INFO, LORA, {"run": str(number)}, number + 1, Idle.identity)
    made.request_id, made.request_digest, made.chose_id = f"r{number}", bytes(32), True
    yield AddModel(inner, number + 1, made.about())
    data = [datum().SerializeToString()]
    loss = CROSS_ENTROPY.SerializeToString()
    whole = Composition(Idle.identity, [1], [b"idle"], {"loss:sum": 0.0}).encode()
    for position in range(1, calls + 1):
        digest = hashlib.sha256(f"{inner} {position}".encode()).digest()
        if position % 2:
            yield AddCall(inner, position, position, digest, ComputeWork(loss, data, [5], True))
            value = {"metrics": {"loss:sum": 1.5}}
            answer = StoredAnswer([bytes(60)], value, kind=CallKind.FORWARD_BACKWARD)
            yield AddAnswer(inner, position, answer, whole)
        else:
            yield AddCall(inner, position, position, digest, StepWork(AdamParams()))
            metrics = {"grad_norm:last": 0.5, "step:last": float(position // 2)}
            answer = StoredAnswer(value={"metrics": metrics}, kind=CallKind.OPTIM_STEP)
            yield AddAnswer(inner, position, answer, whole)
            step = StoredStep(position, position, position // 2, time.time(), metrics)
            yield AddStep(inner, step, 10_000)
    yield AddSnapshot(inner, calls, calls // 2, folder)
    yield Trim(inner, calls)


# --- checkpoints ------------------------------------------------------------------------------


def write_checkpoints(
    folder: Path, count: int, owners: int, *, soon: int = 0, many: int = 0
) -> None:
    """A catalogue of checkpoints that are there for ever, and some that are not.

    Where some are there it goes on behind them.

    Args:
        folder: The Checkpoint server's data folder.
        count: Number of checkpoints, ten of each model; one in ten has optimizer state.
        owners: Number of tenants that have them.
        soon: How many of them expire within an hour.
        many: How many of them, the last ones, are of one model of `LARGE` instead.
    """
    private_folder(folder)
    transactions = open_local(folder / CATALOGUE_FILE, may_be_new=True)
    transactions.db.execute("PRAGMA cache_size=-200000")
    first = int(transactions.db.execute("SELECT count(*) FROM checkpoints").fetchone()[0])
    every = (
        _checkpoint(number, owners, expires=number < soon, is_one_of_many=number >= count - many)
        for number in range(first, count)
    )
    while batch := list(itertools.islice(every, CHECKPOINTS_AT_ONCE)):
        transactions.write(lambda rows, some=batch: [rows.add(each) for each in some])
    transactions.close()


def checkpoint_path(number: int, owners: int) -> CheckpointPath:
    """Where the checkpoint of this number is, unless it is one of many."""
    kind = CheckpointKind.SAMPLER if number % 10 else CheckpointKind.TRAINING
    model = number // 10
    return CheckpointPath(
        inner_id(owner(model, owners), model_id(model)), kind, f"step-{number % 10}"
    )


def _checkpoint(number: int, owners: int, *, expires: bool, is_one_of_many: bool) -> Checkpoint:
    path = checkpoint_path(number, owners)
    if is_one_of_many:
        path = CheckpointPath(inner_id(LARGE, MANY), path.kind, f"step-{number}")
    names = ["adapter_config.json", "adapter_model.safetensors", "model_state.json"]
    names += ["optimizer.safetensors"] if path.kind is CheckpointKind.TRAINING else []
    digests = [hashlib.sha256(f"{number} {name}".encode()).hexdigest() for name in names]
    now_s = time.time()
    return Checkpoint(
        path=path,
        base_model="tiny",
        tuning=LORA,
        step_count=3,
        create_time_s=now_s,
        expire_time_s=now_s + number % 3600 if expires else None,
        user_metadata={"number": str(number)},
        files=[Blob(name, BLOB_BYTES, each) for name, each in zip(names, digests, strict=True)],
    )

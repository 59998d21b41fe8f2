"""A tenant's checkpoint is a claim: hostile ones are refused when they are written, and again when
they are read, before anything is allocated for what they say."""

import contextlib
import hashlib
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest

from attack.amount import ATTACKS
from attack.harness import targets_of, watching
from attack.hostile_checkpoints import (
    HOSTILE,
    LORA,
    ONLY_TRAINING,
    STEPS,
    Hostile,
    good_files,
)
from checkpoints import ServerProcess
from clusters import RunningCluster
from engines import only
from tinsmith import v1
from tinsmith.cluster import Cluster
from tinsmith.internal.v1 import trainer_link_service_pb2 as link_pb
from tinsmith.v1 import types_pb2
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.checkpoint.rules import Header, Keeper
from tinsmithd.checkpoint.store import Blob
from tinsmithd.convert import types as convert
from tinsmithd.domain import CheckpointKind, CheckpointPath, LoraConfig, ModelState, Tuning
from tinsmithd.trainer.commands import Commands
from wire import error_in, reason_and_field

PATH = "tinsmith://run/weights/hostile"
SAID = {
    "base_model": "tiny-llama",
    "lora_config": types_pb2.LoraConfig(rank=LORA.rank, seed=0),
    "step_count": STEPS,
}
ALLOCATED_BYTES_MAX = 64 * 1024 * 1024
"""What Python allocates to read and refuse one, besides its bytes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("checkpoints") / "data") as running:
        yield running


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_state_is_checked_when_it_is_written(server: ServerProcess, kind: str) -> None:
    """Typed, with the file and the field, and nothing is left."""
    hostile = HOSTILE[kind]
    with pytest.raises(grpc.RpcError) as refusal:
        server.write(hostile.files(), PATH, **{**SAID, **hostile.header}, piece_bytes=1 << 20)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refusal.value.details()
    assert reason_and_field(refusal.value)[1] == hostile.refused_field
    assert PATH not in server.paths()


def test_good_states_are_taken(server: ServerProcess) -> None:
    """What the hostile ones are made of, with and without an optimizer."""
    server.write(good_files(), "tinsmith://run/weights/good", **SAID)
    weights = good_files(optimizer=False)
    server.write(weights, "tinsmith://run/sampler_weights/good", **SAID)


class Allocating:
    """An engine that only notes what it would have allocated for."""

    info: Any = None
    identity: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.created: list[Tuning] = []
        self.imported: list[ModelState] = []

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        self.created.append(tuning)

    def import_state(self, model_id: str, state: ModelState, *, optimizer: bool) -> None:
        self.imported.append(state)

    def delete_model(self, model_id: str) -> None: ...


def import_into(
    engine: Any, hostile: Hostile | None, ranks: int, **said: Any
) -> link_pb.AttachRequest:
    """What rank 0 of several answers to a state."""
    commands, answers = Commands(only(engine), world_size=ranks), list[link_pb.AttachRequest]()
    for name, data in (good_files() if hostile is None else hostile.files()).items():
        piece = link_pb.StatePiece(file_name=name, data=data)
        commands.apply(link_pb.AttachResponse(command_id=7, piece=piece), answers.append)
    command = link_pb.ImportState(optimizer=True, create=True, step_count=STEPS, **said)
    message = link_pb.AttachResponse(command_id=7, model_id="m", import_state=command)
    commands.apply(message, answers.append)
    (answer,) = answers
    return answer


def lora_of(hostile: Hostile | None) -> LoraConfig:
    """What the header says."""
    if hostile is not None and "lora_config" in hostile.header:
        return LoraConfig(rank=hostile.header["lora_config"].rank)
    return LORA


def said_of(hostile: Hostile | None) -> dict[str, Any]:
    return convert.tuning_to_pb(lora_of(hostile))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_state_is_checked_again_before_anything_is_allocated(kind: str) -> None:
    """As an older release may have taken it: several ranks answer with a typed refusal, where any
    other exception would end the group."""
    engine, hostile = Allocating(), HOSTILE[kind]
    size = sum(map(len, hostile.files().values()))
    tracemalloc.start()
    try:
        answer = import_into(engine, hostile, 2, **said_of(hostile))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    error = error_in(answer.failed)
    assert error.reason == "CHECKPOINT_CORRUPT"
    assert hostile.file in error.message
    assert len(answer.failed.status) < 2000
    assert (engine.created, engine.imported) == ([], [])
    assert peak < 3 * size + ALLOCATED_BYTES_MAX


def test_a_good_state_is_imported() -> None:
    """And a snapshot that the ranks made themselves, whatever its values became."""
    engine = Allocating()
    assert import_into(engine, None, 2, **said_of(None)).HasField("done")
    assert import_into(engine, HOSTILE["NaN weight"], 2).HasField("done")
    assert len(engine.imported) == 2


KEPT = [kind for kind, hostile in HOSTILE.items() if not hostile.too_large]


def keep_unchecked(folder: Path) -> None:
    """Put all of them into a Checkpoint server's folder, as a release without checks would have."""
    folder.mkdir(parents=True)
    with (
        mock.patch("tinsmithd.checkpoint.rules.write.check_files"),
        contextlib.closing(open_keeper(folder, checkpoint_bytes_max=1 << 30)) as keeper,
    ):
        for number, kind in enumerate(KEPT):
            hostile, name = HOSTILE[kind], f"h{number}"
            keep_one(keeper, hostile, CheckpointKind.TRAINING, name, hostile.files())
            if kind not in ONLY_TRAINING:
                files = hostile.files(optimizer=False)
                keep_one(keeper, hostile, CheckpointKind.SAMPLER, name, files)


def keep_one(
    keeper: Keeper, hostile: Hostile, kind: CheckpointKind, name: str, files: dict[str, bytes]
) -> None:
    header = Header(
        path=CheckpointPath("run", kind, name),
        base_model="tiny-llama",
        tuning=lora_of(hostile),
        step_count=STEPS,
        ttl_seconds=None,
        overwrite=False,
        user_metadata={},
    )
    write = keeper.begin(header)
    for file_name, data in files.items():
        write.append(file_name, 0, data)
    write.commit([Blob(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()])


@pytest.mark.parametrize("ranks", [1, 2] if ATTACKS else [2])
@pytest.mark.timeout(300)
def test_what_is_kept_already_ends_nobody(tiny_model: Path, tmp_path: Path, ranks: int) -> None:
    """Created from, loaded and sampled through the wire: typed refusals, the processes of the rank
    group stay, and no server grows."""
    keep_unchecked(tmp_path / "cluster" / "checkpoints")
    with (
        RunningCluster(tiny_model, tmp_path / "cluster", ranks=ranks) as cluster,
        Cluster(cluster.address) as stubs,
    ):
        lora = v1.LoraConfig(rank=LORA.rank, seed=0)
        model = stubs.training.CreateModel(v1.CreateModelRequest(lora_config=lora)).model
        pids, seq_id = cluster.rank_pids(), 0
        prompt = v1.ModelInput(chunks=[v1.ModelInputChunk(tokens=v1.Tensor(ints=[1, 2, 3]))])

        def create(path: str) -> None:
            request = v1.CreateModelRequest(checkpoint_path=path, with_optimizer=True)
            stubs.training.CreateModel(request, timeout=60)

        def load(path: str) -> None:
            nonlocal seq_id
            seq_id += 1
            request = v1.LoadCheckpointRequest(
                model_id=model.model_id, seq_id=seq_id, checkpoint_path=path, with_optimizer=True
            )
            stubs.training.LoadCheckpoint(request, timeout=60)

        def sample(path: str) -> None:
            path = path.replace("/weights/", "/sampler_weights/")
            request = v1.SampleRequest(
                checkpoint_path=path,
                prompt=prompt,
                sampling_params=v1.SamplingParams(max_tokens=1),
            )
            list(stubs.sampler.Sample(request, timeout=60))

        with watching(targets_of(cluster)) as watch:
            for number, kind in enumerate(KEPT):
                for use in (create, load, sample):
                    if use is sample and kind in ONLY_TRAINING:
                        continue
                    with pytest.raises(grpc.RpcError) as refusal:
                        use(f"tinsmith://run/weights/h{number}")
                    watch.answered(refusal.value.code())
                    reason, _ = reason_and_field(refusal.value)
                    assert reason in ("CHECKPOINT_CORRUPT", "INCOMPATIBLE_CHECKPOINT"), (kind, use)
        assert cluster.rank_pids() == pids
        step = v1.OptimStepRequest(model_id=model.model_id, seq_id=seq_id + 1)
        assert stubs.training.OptimStep(step, timeout=60).metrics["step:last"] == 1

"""Models and checkpoints at rest: what a server of many takes, and what calls take there."""

import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from checkpoints import files, messages
from scale import population
from scale.report import Figure, percentiles
from scale.servers import Keys, Server, idle_ranks, nbytes
from scale.sizes import Sizes
from tinsmith import v1 as pb
from tinsmithd.domain import CheckpointPath
from tinsmithd.rpc.paging import PAGE_SIZE_DEFAULT, token_after

CALL_TARGET_MS = 20.0
START_TARGET_S = 10.0
CALLS = 1000
READS_SHARE = 10.0
"""More of a processor than this, in percent, has a server that reads its rows."""
MIB = 1024 * 1024


def models(sizes: Sizes) -> Iterator[Figure]:
    """Models at rest of many owners, at several numbers of them."""
    for count in sizes.points(sizes.models):
        with tempfile.TemporaryDirectory() as scratch:
            yield from _models(Path(scratch), sizes, count)


def _models(folder: Path, sizes: Sizes, count: int) -> Iterator[Figure]:
    at = f"{count:,} models"
    population.write_models(folder / "data", count, sizes.owners, sizes.calls_kept)
    keys = Keys(folder, *(population.owner(number, sizes.owners) for number in range(3)))
    settings: dict[str, object] = {"models_kept_max": 2 * count + 1000}
    journal = folder / "data" / "journal.sqlite"
    yield Figure("models", at, "journal", journal.stat().st_size / MIB, "MiB")
    with Server("training", folder, keys, **settings) as server:
        yield Figure("models", at, "start", server.start_s, "s", START_TARGET_S)
        yield Figure("models", at, "memory", server.memory_mib, "MiB")
        with idle_ranks(server):
            yield from _calls_on_models(server, at, count, sizes)
        yield Figure("models", at, "memory after the calls", server.memory_mib, "MiB")
        yield Figure("models", at, "processor while nobody calls", server.share_in(5), "%")
    if count == sizes.models:
        yield from _expiry_of_models(folder, keys, at, settings)


def _calls_on_models(server: Server, at: str, count: int, sizes: Sizes) -> Iterator[Figure]:
    rng = random.Random(1)
    one = population.owner(0, sizes.owners)
    tenant = list(range(0, count, sizes.owners))
    get = [
        pb.GetModelRequest(model_id=population.model_id(rng.choice(tenant))) for _ in range(CALLS)
    ]
    for what, method, requests, who in (
        ("list", "ListModels", [pb.ListModelsRequest()] * CALLS, one),
        ("list of an administrator", "ListModels", [pb.ListModelsRequest()] * CALLS, ""),
        ("get", "GetModel", get, one),
        ("get of an administrator", "GetModel", get, ""),
    ):
        times = server.times_ms(method, iter(requests), who)
        yield from percentiles("models", at, what, times, CALL_TARGET_MS)
    created: list[float] = []
    deleted: list[float] = []
    lora = pb.LoraConfig(rank=4, seed=1)
    for number in range(CALLS // 4):
        request = pb.CreateModelRequest(lora_config=lora, model_id=f"new-{number}")
        created += server.times_ms("CreateModel", iter([request]), one)
        gone = pb.DeleteModelRequest(model_id=f"new-{number}")
        deleted += server.times_ms("DeleteModel", iter([gone]), one)
    yield from percentiles("models", at, "create", created, CALL_TARGET_MS)
    yield from percentiles("models", at, "delete", deleted, CALL_TARGET_MS)
    waking = [
        pb.GetAnswerRequest(model_id=population.model_id(number), seq_id=sizes.calls_kept)
        for number in tenant[:50]
    ]
    times = [time_ms for each in waking for time_ms in _answer(server, each, one)]
    yield from percentiles("models", at, "first call since the start", times)


def _answer(server: Server, request: pb.GetAnswerRequest, who: str) -> list[float]:
    begun_s = time.perf_counter()
    list(server.stub.GetAnswer(request, metadata=server.shown(who)))
    return [(time.perf_counter() - begun_s) * 1e3]


def _expiry_of_models(
    folder: Path, keys: Keys, at: str, settings: dict[str, object]
) -> Iterator[Figure]:
    """Everything expires at once; an administrator lists meanwhile."""
    with Server("training", folder, keys, model_idle_ttl_s=1, **settings) as server:
        request = pb.ListModelsRequest(page_size=1)

        def left() -> int:
            return int(server.stub.ListModels(request, metadata=server.shown()).total_size)

        every = left()
        while left() == every:
            time.sleep(0.05)
        begun_s = time.perf_counter()
        times = server.times_while(
            lambda: left() > 0 and time.perf_counter() - begun_s < 30, "ListModels", request
        )
        took_s = time.perf_counter() - begun_s
        gone = every - left()
    if times:
        yield from percentiles("models", at, "list while models expire", times, CALL_TARGET_MS)
    yield Figure("models", at, "expired", gone / took_s, "models/s")


# --- checkpoints ------------------------------------------------------------------------------


def checkpoints(sizes: Sizes) -> Iterator[Figure]:
    """Checkpoints in the catalogue, at several numbers of them."""
    for count in sizes.points(sizes.checkpoints):
        with tempfile.TemporaryDirectory() as scratch:
            kept = Path(sizes.kept) / f"checkpoints-{count}" if sizes.kept else Path(scratch)
            at = f"{count:,} checkpoints"
            begun_s = time.perf_counter()
            population.write_checkpoints(
                kept / "data", count, sizes.owners, soon=count // 100, many=count // 20
            )
            yield Figure("checkpoints", at, "population", time.perf_counter() - begun_s, "s")
            if sizes.kept and not sizes.only_populate:  # what is kept stays as it was written
                shutil.copytree(kept / "data", Path(scratch) / "data")
            if not sizes.only_populate:
                yield from _checkpoints(Path(scratch), sizes, count, at)


def _checkpoints(folder: Path, sizes: Sizes, count: int, at: str) -> Iterator[Figure]:
    keys = Keys(folder, population.owner(count // 20, sizes.owners), population.LARGE)
    yield Figure("checkpoints", at, "catalogue", nbytes(folder / "data") / MIB, "MiB")
    settings: dict[str, object] = {"sweep_interval_s": 5}
    with Server("checkpoint", folder, keys, **settings) as server:
        yield Figure("checkpoints", at, "start", server.start_s, "s", START_TARGET_S)
        yield Figure("checkpoints", at, "memory", server.memory_mib, "MiB")
        yield from _calls_on_checkpoints(server, at, count, sizes)
        yield Figure("checkpoints", at, "memory after the calls", server.memory_mib, "MiB")
        begun_s = time.perf_counter()
        while (share := server.share_in(5)) > READS_SHARE and time.perf_counter() - begun_s < 600:
            pass  # it reads which files are referred to
        yield Figure("checkpoints", at, "processor while nobody calls", share, "%")
        yield Figure("checkpoints", at, "memory when all rows were read", server.memory_mib, "MiB")
    with Server("checkpoint", folder, keys, **settings) as server:
        yield Figure("checkpoints", at, "start after a kill", server.start_s, "s", START_TARGET_S)


def _calls_on_checkpoints(server: Server, at: str, count: int, sizes: Sizes) -> Iterator[Figure]:
    rng = random.Random(1)
    first = count // 20  # a model that does not expire
    one = population.owner(first, sizes.owners)
    of_one = [
        str(population.checkpoint_path(number, sizes.owners))
        for model in range(first, count // 10, sizes.owners)
        for number in range(10 * model, 10 * model + 10)
        # The others expire, or are of one model.
        if count // 100 <= number < count - count // 20
    ]
    get = [pb.GetCheckpointRequest(checkpoint_path=rng.choice(of_one)) for _ in range(CALLS)]
    model = CheckpointPath.parse(of_one[0]).model_id
    for what, method, requests, who in (
        ("list", "ListCheckpoints", [pb.ListCheckpointsRequest()] * CALLS, one),
        (
            "list of a model",
            "ListCheckpoints",
            [pb.ListCheckpointsRequest(model_id=model)] * CALLS,
            one,
        ),
        (
            "list of a model with many",
            "ListCheckpoints",
            [pb.ListCheckpointsRequest(model_id=population.MANY)] * CALLS,
            population.LARGE,
        ),
        ("list of an administrator", "ListCheckpoints", [pb.ListCheckpointsRequest()] * CALLS, ""),
        (
            "list of an administrator, page after page",
            "ListCheckpoints",
            _pages(server, min(CALLS, count // PAGE_SIZE_DEFAULT)),
            "",
        ),
        ("get", "GetCheckpoint", get, one),
        ("get of an administrator", "GetCheckpoint", get, ""),
        ("expire", "UpdateCheckpoint", [_expiring(path) for path in of_one[:CALLS]], one),
        ("delete", "DeleteCheckpoint", [_deleting(path) for path in of_one[: CALLS // 2]], one),
    ):
        times = server.times_ms(method, iter(requests), who)
        yield from percentiles("checkpoints", at, what, times, CALL_TARGET_MS)
    written = []
    for number in range(CALLS // 4):
        stream = list(
            messages(f"tinsmith://new-{number}/weights/one", files(number), piece_bytes=MIB)
        )
        begun_s = time.perf_counter()
        server.stub.WriteCheckpoint(iter(stream), metadata=server.shown(one))
        written.append((time.perf_counter() - begun_s) * 1e3)
    yield from percentiles("checkpoints", at, "create", written, CALL_TARGET_MS)


def _pages(server: Server, count: int) -> Iterator[pb.ListCheckpointsRequest]:
    """Asks for one page after the other: no row of a page was in one before."""
    at = server.stub.ListCheckpoints(pb.ListCheckpointsRequest(), metadata=server.shown())
    number = int(at.checkpoints[0].user_metadata["number"]) + 1
    for below in range(number, number - PAGE_SIZE_DEFAULT * count, -PAGE_SIZE_DEFAULT):
        yield pb.ListCheckpointsRequest(page_token=token_after(below))


def _expiring(path: str) -> pb.UpdateCheckpointRequest:
    request = pb.UpdateCheckpointRequest(checkpoint_path=path)
    request.ttl.FromSeconds(3600)
    request.update_mask.paths.append("ttl")
    return request


def _deleting(path: str) -> pb.DeleteCheckpointRequest:
    return pb.DeleteCheckpointRequest(checkpoint_path=path)

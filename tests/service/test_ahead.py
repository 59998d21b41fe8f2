"""The Sampler has adapters before somebody samples from them, and does without where it was not
told."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from data import make_data
from sampler_server import PATH, Served
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.config import CheckpointConfig, SamplerConfig
from tinsmithd.domain import AdamParams, CrossEntropy, LoraConfig, ModelState
from tinsmithd.files import BLOBS_FOLDER, blob_file
from tinsmithd.modeling.base import load_base
from tinsmithd.sampler import ahead
from tinsmithd.sampler.admission import Admission
from tinsmithd.sampler.server import SamplerServer
from tinsmithd.state import files as state_files
from tinsmithd.trainer.engines.interface import Batch
from tinsmithd.trainer.engines.reference import ReferenceEngine
from waiting import until

EPHEMERAL = "tinsmith://run/sampler_weights/ephemeral-0000000000000001"


@pytest.fixture(scope="module")
def state(tiny_model: Path) -> ModelState:
    """A trained adapter."""
    trainer = ReferenceEngine(load_base(str(tiny_model), dtype="float32", on_progress=print))
    trainer.create_model("m", LoraConfig(rank=4, seed=3))
    batch = Batch("m", make_data(0, 2), CrossEntropy(), backward=True)
    trainer.forward(batch, lambda *_: None)
    trainer.optim_step("m", AdamParams(learning_rate=3e-2))
    return trainer.export_state("m", optimizer=False)


@asynccontextmanager
async def checkpoints(folder: Path, port: int = 0) -> AsyncIterator[CheckpointServer]:
    server = CheckpointServer(
        CheckpointConfig(
            listen_address=f"127.0.0.1:{port}", data_folder=str(folder), stop_grace_s=0.1
        )
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def serving(
    tiny_model: Path, checkpoint: CheckpointServer, folder: Path, **settings: object
) -> AsyncIterator[Served]:
    values = {
        "listen_address": "127.0.0.1:0",
        "base_model": str(tiny_model),
        "checkpoint_target": f"127.0.0.1:{checkpoint.port}",
        "stop_grace_s": 1,
        "threads": 1,
        **settings,
    }
    sampler = SamplerServer(SamplerConfig(**values))
    await sampler.start()
    await sampler.loaded()
    served = Served(sampler, checkpoint, folder)
    if settings.get("ahead_bytes_max") != 0:
        await until(lambda: checkpoint._watchers._wanted)  # what is written from now on is told
    try:
        yield served
    finally:
        for channel in served.channels:
            await channel.close()
        await sampler.stop()


def admission_of(served: Served) -> Admission:
    admission = served.server._servicer.admission
    assert admission is not None
    return admission


async def until_ahead(served: Served, count: int) -> None:
    """Wait until so many were brought in ahead, and are loaded."""
    async with asyncio.timeout(30):
        loaded = admission_of(served).loaded
        while loaded.ahead < count or loaded.fetching:
            await asyncio.sleep(0.01)


async def sampled(served: Served, path: str) -> int:
    """Number of tokens, once the Sampler has found the Checkpoint server again."""
    async with asyncio.timeout(60):
        while True:
            try:
                return len((await served.sample(checkpoint_path=path))[0][0])
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("here", [False, True])
async def test_weights_are_there_before_the_first_call_asks_for_them(
    tiny_model: Path, tmp_path: Path, state: ModelState, here: bool
) -> None:
    """Told at once: the call needs no Checkpoint server any more, whether the adapter was sent or
    read where it lies."""
    folder = tmp_path / "checkpoints"
    settings = {"checkpoint_folder": str(folder)} if here else {}
    async with AsyncExitStack() as stack:
        checkpoint = await stack.enter_async_context(checkpoints(folder))
        served = await stack.enter_async_context(
            serving(tiny_model, checkpoint, tmp_path, **settings)
        )
        written = await served.write(state, EPHEMERAL, ephemeral=True)
        await until_ahead(served, 1)
        await checkpoint.stop()
        shutil.rmtree(folder)
        made = await served.sample(
            checkpoint_path=EPHEMERAL, checkpoint_digest=written.checkpoint.digest
        )
        assert len(made[0][0]) == 8
        assert admission_of(served).loaded.ahead_used == 1


async def test_files_that_are_damaged_where_they_lie_are_sent(
    tiny_model: Path, tmp_path: Path, state: ModelState
) -> None:
    """A copy of the folder is none of the Checkpoint server's: nothing that came of it is used."""
    folder, copy = tmp_path / "checkpoints", tmp_path / "copy"
    (copy / BLOBS_FOLDER).mkdir(parents=True)
    async with AsyncExitStack() as stack:
        checkpoint = await stack.enter_async_context(checkpoints(folder))
        served = await stack.enter_async_context(
            serving(tiny_model, checkpoint, tmp_path, checkpoint_folder=str(copy))
        )
        sent = await served.write(state)
        await until_ahead(served, 1)
        right = await served.sample(checkpoint_path=PATH)
        for file in sent.checkpoint.files:
            place = blob_file(copy / BLOBS_FOLDER, file.sha256.hex())
            place.parent.mkdir(exist_ok=True)
            content = blob_file(folder / BLOBS_FOLDER, file.sha256.hex()).read_bytes()
            last = content[-1] ^ 0x40  # the exponent of a weight
            is_weights = file.name == state_files.WEIGHTS_FILE
            place.write_bytes(content[:-1] + bytes([last]) if is_weights else content)
        again = PATH.replace("one", "again")
        await served.write(state, again)
        assert await sampled(served, again) == len(right[0][0])
        assert await served.sample(checkpoint_path=again) == right
        assert len(served.server._adapters._not_here) == 1, "it was looked at where it lies"


async def test_a_lost_watch_only_costs_time(
    tiny_model: Path, tmp_path: Path, state: ModelState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved meanwhile is fetched when it is asked for; later the Sampler is told again."""
    monkeypatch.setattr(ahead, "RETRY_S_FIRST", 0.05)
    folder = tmp_path / "checkpoints"
    missed = PATH.replace("one", "missed")
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(checkpoints(folder))
        served = await stack.enter_async_context(serving(tiny_model, first, tmp_path))
        await served.write(state)
        await until_ahead(served, 1)
        await first.stop()
        async with checkpoints(folder) as elsewhere:
            writer = Served(served.server, elsewhere, tmp_path)
            await writer.write(state, missed)
            for channel in writer.channels:
                await channel.close()
        await stack.enter_async_context(checkpoints(folder, first.port))
        assert await sampled(served, missed) == 8
        loaded = admission_of(served).loaded
        async with asyncio.timeout(60):
            while loaded.ahead < 2:
                await served.write(state, PATH.replace("one", f"told-{loaded.ahead}"))
                await asyncio.sleep(0.1)
    assert admission_of(served).loaded.ahead_used == 0


async def test_large_ones_and_those_of_other_models_are_left_alone(
    tiny_model: Path, tmp_path: Path, state: ModelState
) -> None:
    """And where nothing is to be brought ahead, nobody watches."""
    folder = tmp_path / "checkpoints"
    async with checkpoints(folder) as checkpoint:
        async with serving(tiny_model, checkpoint, tmp_path, ahead_bytes_max=1) as served:
            await served.write(state)
            await served.write(state, PATH.replace("one", "other"), base_model="other")
            await asyncio.sleep(0.2)
            assert len(admission_of(served).loaded) == 0
            assert len((await served.sample(checkpoint_path=PATH))[0][0]) == 8
        await until(lambda: not checkpoint._watchers._wanted)
        async with serving(tiny_model, checkpoint, tmp_path, ahead_bytes_max=0) as served:
            assert not checkpoint._watchers._wanted
            assert len((await served.sample(checkpoint_path=PATH))[0][0]) == 8

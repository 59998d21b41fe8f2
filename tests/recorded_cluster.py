"""A Training server and its rank 0 in the test's own process, to see what the rank was told.

The server, the wire between the two, the rank's loop and its engine are the real ones.
"""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from engines import only
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.internal.v1 import trainer_link_service_pb2 as link_pb
from tinsmithd.config import TrainingConfig
from tinsmithd.convert import types as convert
from tinsmithd.rpc import link_secret
from tinsmithd.trainer.commands import Commands
from tinsmithd.trainer.engines.interface import TrainingEngine
from tinsmithd.trainer.link import LinkTarget, hello, lead
from tinsmithd.training.server import TrainingServer

ADAM = pb.AdamParams(learning_rate=0.01, eps=0.1)
CROSS_ENTROPY = pb.LossFn(cross_entropy=pb.CrossEntropyLoss())


def data_of(seed: int, count: int, tokens: int, targets: int = 0) -> list[pb.Datum]:
    """Random cross-entropy data of equal length, with some targets per position or just one."""
    shape = (tokens, targets) if targets else tokens
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(count):
        inputs = {
            "target_tokens": tensors.encode(rng.integers(0, 256, shape)),
            "weights": tensors.encode(rng.normal(size=shape).astype(np.float32)),
        }
        chunk = pb.ModelInputChunk(tokens=tensors.encode(rng.integers(0, 256, tokens)))
        data.append(pb.Datum(model_input=pb.ModelInput(chunks=[chunk]), loss_fn_inputs=inputs))
    return data


def forward_backward(
    model_id: str, seq_id: int, data: Sequence[pb.Datum]
) -> pb.ForwardBackwardRequest:
    return pb.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn=CROSS_ENTROPY, data=data
    )


class ServerGone(Exception):
    """Ends the loop of a rank that would attach again for ever."""


class RankZero:
    """Rank 0 in a thread of this process: the real loop and engine, writing its commands down.

    Attributes:
        computes: What it computed, in order: which model, and what.
        go: It waits for this before each `compute`, so that a test can queue calls up.
    """

    def __init__(self, engine: TrainingEngine, server: LinkTarget) -> None:
        self.computes: list[tuple[str, link_pb.Compute]] = []
        self.go = threading.Event()
        engines = only(engine)
        greeting = hello(engines, "reference", 1)
        link = (Commands(engines, world_size=1), server, greeting)
        self._thread = threading.Thread(target=self._run, args=link, daemon=True)
        self._thread.start()

    def _run(self, *link: Any) -> None:
        with contextlib.suppress(ServerGone):
            lead(*link, self._take)

    def _take(self, data: bytes | None) -> bytes:
        assert data is not None
        if not data:
            raise ServerGone
        command = link_pb.AttachResponse.FromString(data)
        if command.HasField("compute"):
            assert self.go.wait(60)
            self.computes.append((command.model_id, command.compute))
        return data

    def computed(self) -> list[tuple[str, int]]:
        """Model and tokens of each."""
        return [(model_id, token_count(compute.data)) for model_id, compute in self.computes]

    def join(self) -> None:
        """Wait until it ended."""
        self._thread.join(30)
        assert not self._thread.is_alive()


def token_count(data: Sequence[bytes]) -> int:
    """Tokens of some data, as a command has them."""
    return sum(len(convert.datum_from_pb(pb.Datum.FromString(d), "").tokens) for d in data)


class RecordedCluster:
    """A Training server in this process with one rank, and a stub of its service.

    Attributes:
        folder: Its `data_folder`.
    """

    def __init__(self, stub: Any, rank: RankZero, folder: Path) -> None:
        self.stub = stub
        self.rank = rank
        self.folder = folder

    async def create(self, seed: int = 1) -> str:
        """Make a model; returns its id."""
        lora = pb.LoraConfig(rank=2, seed=seed)
        response = await self.stub.CreateModel(pb.CreateModelRequest(lora_config=lora))
        return str(response.model.model_id)

    async def compute(
        self, model_id: str, seq_id: int, data: Sequence[pb.Datum]
    ) -> list[pb.ForwardBackwardResponse]:
        """One forward_backward."""
        call = self.stub.ForwardBackward(iter([forward_backward(model_id, seq_id, data)]))
        return [response async for response in call]

    async def queued(self, *models: tuple[str, Sequence[Sequence[pb.Datum]]]) -> list[Any]:
        """Queue calls of several models, all of them before the first runs; returns the answers.

        Numbers go out from the last to the first, so that a model's calls all become ready
        together.
        """
        self.rank.go.clear()
        calls = [
            asyncio.create_task(self.compute(model_id, seq_id, data))
            for model_id, every in models
            for seq_id, data in reversed(list(enumerate(every, 1)))
        ]
        for model_id, every in models:
            await self.until_next(model_id, len(every) + 1)
        self.rank.go.set()
        return await asyncio.gather(*calls)

    async def until_next(self, model_id: str, seq_id: int) -> None:
        """Wait until a model's calls before this number were taken in."""
        request = pb.GetModelRequest(model_id=model_id)
        while (await self.stub.GetModel(request)).model.next_seq_id < seq_id:
            await asyncio.sleep(0.01)

    async def until_computed(self, count: int) -> None:
        """Wait until rank 0 took up so many computes."""
        while len(self.rank.computes) < count:
            await asyncio.sleep(0.01)

    async def step(self, model_id: str, seq_id: int) -> Mapping[str, float]:
        """One optimizer step; returns its metrics."""
        request = pb.OptimStepRequest(model_id=model_id, seq_id=seq_id, adam_params=ADAM)
        return dict((await self.stub.OptimStep(request)).metrics)


@asynccontextmanager
async def recorded_cluster(
    engine: TrainingEngine, quantum_tokens: int, **settings: Any
) -> AsyncIterator[RecordedCluster]:
    """Run one on free ports; it keeps nothing, unless `durability` says so."""
    stack = contextlib.ExitStack()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config = TrainingConfig(
        **{
            "listen_address": "127.0.0.1:0",
            "link_address": "127.0.0.1:0",
            "data_folder": str(folder),
            "quantum_tokens": quantum_tokens,
            "durability": "none",
            **settings,
        }
    )
    server = TrainingServer(config)
    await server.start()
    target = LinkTarget(f"127.0.0.1:{server.link_port}", str(link_secret.made_in(folder)))
    rank = RankZero(engine, target)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub: Any = pb.TrainingServiceStub(channel)
            while not (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).base_models:
                await asyncio.sleep(0.02)
            yield RecordedCluster(stub, rank, folder)
    finally:
        rank.go.set()
        await server.stop()
        await asyncio.to_thread(rank.join)
        stack.close()

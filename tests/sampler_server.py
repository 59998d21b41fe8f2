"""A Sampler and a Checkpoint server beside it, for tests that ask the Sampler alone."""

import contextlib
import hashlib
import itertools
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import programs
from checkpoints import to_files
from tinsmith.tensors import decode
from tinsmith.v1 import checkpoint_service_pb2 as checkpoint_pb
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.config import CheckpointConfig, SamplerConfig
from tinsmithd.convert.types import lora_to_pb
from tinsmithd.domain import ModelState
from tinsmithd.sampler.server import SERVICE_NAME, SamplerServer

PROMPT = [10, 20, 30, 40]
PATH = "tinsmith://run/sampler_weights/one"
CONTEXT = 512


class Served:
    """A Sampler and a Checkpoint server, with stubs."""

    def __init__(self, sampler: SamplerServer, checkpoint: CheckpointServer, folder: Path) -> None:
        self.server, self.folder = sampler, folder
        self.channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{port}")
            for port in (sampler.port, checkpoint.port)
        ]
        self.stub = SamplerServiceStub(self.channels[0])
        self.checkpoints = CheckpointServiceStub(self.channels[1])

    async def sample(self, **fields: object) -> list[tuple[list[int], list[float], int]]:
        """Tokens, logprobs and stop reason of each sequence."""
        made: dict[int, tuple[list[int], list[float], int]] = {}
        async for response in self.stub.Sample(sample_request(**fields)):
            for delta in response.deltas:
                tokens, logprobs, reason = made.get(delta.sequence_index, ([], [], 0))
                assert reason == 0, "nothing comes after a stop reason"
                tokens += decode(delta.tokens).tolist()
                logprobs += decode(delta.logprobs).tolist()
                made[delta.sequence_index] = (tokens, logprobs, delta.stop_reason)
        return [made[index] for index in sorted(made)]

    async def write(
        self, state: ModelState, path: str = PATH, **header: object
    ) -> checkpoint_pb.WriteCheckpointResponse:
        fields = {
            "base_model": "tiny-llama",
            "lora_config": lora_to_pb(state.tuning),
            "step_count": state.step_count,
            "overwrite": True,
            **header,
        }
        files = to_files(state)
        requests = [
            checkpoint_pb.WriteCheckpointRequest(
                header=checkpoint_pb.WriteCheckpointHeader(checkpoint_path=path, **fields)
            )
        ]
        for name, data in files.items():
            piece = checkpoint_pb.CheckpointPiece(
                file_name=name, offset=0, data=data, crc32=zlib.crc32(data)
            )
            requests.append(checkpoint_pb.WriteCheckpointRequest(piece=piece))
        listed = [
            checkpoint_pb.CheckpointFile(
                name=n, size_bytes=len(d), sha256=hashlib.sha256(d).digest()
            )
            for n, d in files.items()
        ]
        commit = checkpoint_pb.WriteCheckpointCommit(files=listed)
        requests.append(checkpoint_pb.WriteCheckpointRequest(commit=commit))
        return await self.checkpoints.WriteCheckpoint(iter(requests))


@contextlib.asynccontextmanager
async def serving(base_model: Path, folder: Path, **settings: Any) -> AsyncIterator[Served]:
    """Both servers on free ports, the base model loaded.

    Args:
        base_model: Its folder.
        folder: The Checkpoint server's data.
        settings: More settings of the Sampler.
    """
    checkpoint = CheckpointServer(
        CheckpointConfig(listen_address="127.0.0.1:0", data_folder=str(folder), stop_grace_s=1)
    )
    await checkpoint.start()
    sampler = SamplerServer(
        SamplerConfig(
            listen_address="127.0.0.1:0",
            base_model=str(base_model),
            checkpoint_target=f"127.0.0.1:{checkpoint.port}",
            stop_grace_s=1,
            **settings,
        )
    )
    await sampler.start()
    await sampler.loaded()
    running = Served(sampler, checkpoint, folder)
    yield running
    for channel in running.channels:
        await channel.close()
    await sampler.stop()
    await checkpoint.stop()


@contextlib.contextmanager
def held_at(step: int) -> Iterator[threading.Event]:
    """Engines of this process stop before a step, counted from now on, until the event is set: a
    test does in the midst of a request what it has to do there, however quick they are."""
    from tinsmithd.sampler.engines.transformers.kv import KvCache  # and torch, for who has it here

    go, steps, batch = threading.Event(), itertools.count(), KvCache.batch

    def counted(*arguments: Any) -> Any:
        if next(steps) >= step:
            assert go.wait(60), "nobody let the engine go on"
        return batch(*arguments)

    with mock.patch.object(KvCache, "batch", counted):
        try:
            yield go
        finally:
            go.set()


@contextlib.contextmanager
def sampler_process(base_model: Path, folder: Path) -> Iterator[tuple[int, str]]:
    """A Sampler as `tinsmith up` starts it, when it serves: its process id, and `host:port`.

    Args:
        base_model: Its folder.
        folder: For its log and what it says of its port.
    """
    port_file = folder / "port"
    with programs.Logged(
        folder / "log",
        *("tinsmithd.sampler", "--listen-address", "127.0.0.1:0", "--threads", "1"),
        *("--base-model", str(base_model), "--port-file", str(port_file)),
    ) as running:
        address = f"127.0.0.1:{running.port_in(port_file)}"
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=120
            )
            next(s for s in watch if s.status == health_pb2.HealthCheckResponse.SERVING)
        yield running.pid, address


async def refusal(call: AsyncIterator[pb.SampleResponse]) -> grpc.aio.AioRpcError:
    """How a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in call:
            pass
    return refused.value


def prompt(tokens: list[int]) -> types_pb2.ModelInput:
    tensor = types_pb2.Tensor(ints=tokens)
    return types_pb2.ModelInput(chunks=[types_pb2.ModelInputChunk(tokens=tensor)])


def sample_request(
    *, params: dict[str, object] | None = None, **fields: object
) -> pb.SampleRequest:
    drawn = {"max_tokens": 8, "seed": 5, "stop": pb.StopCondition(), **(params or {})}
    values = {"prompt": prompt(PROMPT), "sampling_params": pb.SamplingParams(**drawn), **fields}
    return pb.SampleRequest(**values)

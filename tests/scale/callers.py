"""Callers of the Training service, in a process of their own (`bench.remote`)."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import uvloop

from tinsmith import v1 as pb
from tinsmith.keys import AUTHORIZATION, SCHEME
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub
from training_calls import CROSS_ENTROPY, datum, step

CHANNELS = 4
DATUM = datum()
Metadata = Sequence[tuple[str, str]]


@dataclass
class Times:
    """What calls took, from when they were due; milliseconds.

    Attributes:
        took_ms: Each call's.
        late_ms: How late each was sent, which is this process's doing.
        failed: What failed, in words.
        wall_s: From the first call's time to the last answer.
    """

    took_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    wall_s: float = 0.0


class Callers:
    """Makes calls of some models.

    Args:
        address: Of the Training server.
        key: What they show; empty where there are no keys.
    """

    def __init__(self, address: str, key: str = "") -> None:
        self._address = address
        self._metadata: Metadata = ((AUTHORIZATION, f"{SCHEME} {key}"),) if key else ()
        self._next: dict[str, int] = {}

    def create(self, count: int) -> list[str]:
        """Make some models."""
        with grpc.insecure_channel(self._address) as channel:
            stub = TrainingServiceStub(channel)
            lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=4, seed=1))
            made = [
                stub.CreateModel(lora, metadata=self._metadata, wait_for_ready=True)
                for _ in range(count)
            ]
        ids = [each.model.model_id for each in made]
        self._next.update(dict.fromkeys(ids, 1))
        return ids

    # --- at a rate --------------------------------------------------------------------------------

    def at_rate(self, ids: Sequence[str], per_second: float, seconds: float) -> Times:
        """Calls at given times, whether earlier ones are answered or not: of each model by turns
        a forward_backward and a step."""
        return uvloop.run(self._at_rate(ids, per_second, seconds))

    async def _at_rate(self, ids: Sequence[str], per_second: float, seconds: float) -> Times:
        times = Times()
        async with _Channels(self._address) as channels:
            stubs = [TrainingServiceStub(channel) for channel in channels]
            begun_s = time.perf_counter() + 0.2
            open_calls = set()
            for number in range(int(per_second * seconds)):
                due_s = begun_s + number / per_second
                if (wait_s := due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                model_id = ids[number // 2 % len(ids)]
                seq_id = self._next[model_id]
                self._next[model_id] += 1
                stub = stubs[number // 2 % CHANNELS]
                made = self._step if number % 2 else self._compute
                task = asyncio.create_task(self._one(times, due_s, made(stub, model_id, seq_id)))
                open_calls.add(task)
                task.add_done_callback(open_calls.discard)
            while open_calls:
                await asyncio.wait(open_calls)
        times.wall_s = time.perf_counter() - begun_s
        return times

    async def _one(self, times: Times, due_s: float, made: Any) -> None:
        times.late_ms.append((time.perf_counter() - due_s) * 1e3)
        try:
            await made
        except grpc.aio.AioRpcError as error:
            times.failed.append(f"{error.code().name}: {error.details()}")
        else:
            times.took_ms.append((time.perf_counter() - due_s) * 1e3)

    # --- a queue ----------------------------------------------------------------------------------

    def keep_queued(self, ids: Sequence[str], each: int, seconds: float, data: int = 1) -> Times:
        """Keep so many calls of each model under way for some seconds; then wait for the rest."""
        return uvloop.run(self._keep_queued(ids, each, seconds, data))

    async def _keep_queued(self, ids: Sequence[str], each: int, seconds: float, data: int) -> Times:
        times = Times()
        async with _Channels(self._address) as channels:
            begun_s = time.perf_counter()

            async def keep(model_id: str, stub: TrainingServiceStub) -> None:
                while time.perf_counter() - begun_s < seconds:
                    seq_id = self._next[model_id]
                    self._next[model_id] += 1
                    made = self._compute(stub, model_id, seq_id, data)
                    await self._one(times, time.perf_counter(), made)

            stubs = [TrainingServiceStub(channel) for channel in channels]
            await asyncio.gather(
                *(
                    keep(model_id, stubs[index % CHANNELS])
                    for index, model_id in enumerate(ids)
                    for _ in range(each)
                )
            )
        times.wall_s = time.perf_counter() - begun_s
        return times

    # --- one call ---------------------------------------------------------------------------------

    async def _compute(self, stub: Any, model_id: str, seq_id: int, data: int = 1) -> None:
        request = pb.ForwardBackwardRequest(
            model_id=model_id, seq_id=seq_id, loss_fn=CROSS_ENTROPY, data=[DATUM] * data
        )
        async for _ in stub.ForwardBackward(iter([request]), metadata=self._metadata):
            pass

    async def _step(self, stub: Any, model_id: str, seq_id: int) -> None:
        await stub.OptimStep(step(model_id, seq_id), metadata=self._metadata)


class _Channels:
    def __init__(self, address: str) -> None:
        self._address = address

    async def __aenter__(self) -> list[grpc.aio.Channel]:
        own = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
        self._channels = [grpc.aio.insecure_channel(self._address, own) for _ in range(CHANNELS)]
        return self._channels

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

"""Calls that are lost, doubled, delayed and cut count once, in order, and are answered alike."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from clusters import RunningCluster
from faults.amount import SEED, amount
from faults.operations import Answers, Operation, apply_all, call_once, changed, make_operations
from faults.proxy import FAULTS, ChaosProxy
from tinsmith import v1 as pb
from tinsmith.errors import from_rpc_error
from tinsmith.v1 import types_pb2

OPERATIONS = amount(400, full=5000)
MODELS = 3
SHARE = 0.3


@pytest.fixture
async def direct(cluster: RunningCluster) -> AsyncIterator[grpc.aio.Channel]:
    """The Training server itself."""
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        yield channel


async def create(channel: grpc.aio.Channel, seed: int) -> str:
    stub: Any = pb.TrainingServiceStub(channel)
    lora = pb.LoraConfig(rank=2, seed=seed)
    return str((await stub.CreateModel(pb.CreateModelRequest(lora_config=lora))).model.model_id)


async def delete(channel: grpc.aio.Channel, model_ids: Sequence[str]) -> None:
    stub: Any = pb.TrainingServiceStub(channel)
    for model_id in model_ids:
        await stub.DeleteModel(pb.DeleteModelRequest(model_id=model_id))


async def next_seq_id(channel: grpc.aio.Channel, model_id: str) -> int:
    stub: Any = pb.TrainingServiceStub(channel)
    request = pb.GetModelRequest(model_id=model_id)
    return int((await stub.GetModel(request)).model.next_seq_id)


async def adapter(cluster: RunningCluster, channel: grpc.aio.Channel, model_id: str) -> bytes:
    """The bytes of the adapter as it is now; takes no number."""
    stub: Any = pb.TrainingServiceStub(channel)
    request = pb.SaveCheckpointRequest(model_id=model_id, kind=types_pb2.CHECKPOINT_KIND_SAMPLER)
    path = (await stub.SaveCheckpoint(request)).checkpoint_path
    content = bytearray()
    async with grpc.aio.insecure_channel(cluster.addresses["checkpoint"]) as checkpoint:
        reader: Any = pb.CheckpointServiceStub(checkpoint)
        async for response in reader.ReadCheckpoint(pb.ReadCheckpointRequest(checkpoint_path=path)):
            if response.piece.file_name == "adapter_model.safetensors":
                content += response.piece.data
    assert content
    return bytes(content)


def steps_of(operations: Sequence[Operation]) -> int:
    return sum(operation.method == "OptimStep" for operation in operations)


def last_step(operations: Sequence[Operation], answers: Answers) -> float:
    (message,) = answers.messages[len(operations)]
    return pb.OptimStepResponse.FromString(message).metrics["step:last"]


@pytest.mark.timeout(900)
async def test_under_faults_on_every_third_call_each_counts_once(
    cluster: RunningCluster, direct: grpc.aio.Channel
) -> None:
    """Answers, step counts and adapters are those of an undisturbed run, to the byte; two
    deliveries of one call at once are one effect and one answer (rows 12, 15, 16)."""
    every = [make_operations(SEED + index, OPERATIONS // MODELS) for index in range(MODELS)]
    twins = [await create(direct, seed) for seed in range(MODELS)]
    wanted = await asyncio.gather(
        *(apply_all(direct, twin, ops) for twin, ops in zip(twins, every, strict=True))
    )
    models = [await create(direct, seed) for seed in range(MODELS)]
    async with (
        ChaosProxy(cluster.address, SEED, share=SHARE) as proxy,
        grpc.aio.insecure_channel(proxy.address) as channel,
    ):
        found = await asyncio.gather(
            *(
                apply_all(channel, model, ops, seed=SEED + index)
                for index, (model, ops) in enumerate(zip(models, every, strict=True))
            )
        )
    assert proxy.differences == []
    assert set(proxy.done) >= set(FAULTS)
    for model, twin, ops, answers, right in zip(models, twins, every, found, wanted, strict=True):
        assert answers.messages == right.messages
        assert await next_seq_id(direct, model) == len(ops) + 1
        assert last_step(ops, answers) == steps_of(ops)
        assert await adapter(cluster, direct, model) == await adapter(cluster, direct, twin)
    assert sum(answers.attempts for answers in found) > 1.1 * sum(map(len, every))
    await delete(direct, [*twins, *models])


async def test_a_repeat_is_equal_and_other_content_a_conflict_without_effect(
    cluster: RunningCluster, direct: grpc.aio.Channel
) -> None:
    """Every call whose answer is kept, many times, while others run (row 17)."""
    operations = make_operations(SEED, 120)
    model, twin = await create(direct, 1), await create(direct, 1)
    answers = await apply_all(direct, model, operations)
    rng = random.Random(SEED)

    async def repeat(seq_id: int) -> None:
        operation = operations[seq_id - 1]
        if rng.random() < 0.5:
            other = changed(operation).bytes_for(model)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await call_once(direct, operation.method, other)
            assert from_rpc_error(refusal.value).reason == "SEQ_ID_CONFLICT"
            assert refusal.value.code() is grpc.StatusCode.ALREADY_EXISTS
        messages = await call_once(direct, operation.method, operation.bytes_for(model))
        assert messages == answers.messages[seq_id]

    numbers = [rng.randint(1, len(operations)) for _ in range(300)]
    await asyncio.gather(*map(repeat, numbers), apply_all(direct, twin, operations))
    assert await next_seq_id(direct, model) == len(operations) + 1
    assert await adapter(cluster, direct, model) == await adapter(cluster, direct, twin)
    await delete(direct, [model, twin])

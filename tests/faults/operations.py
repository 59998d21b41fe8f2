"""Seeded sequences of cheap calls on one model, and how they are sent: as raw bytes, again and
again until they are answered."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from tinsmith import tensors
from tinsmith import v1 as pb

SERVICE = "/tinsmith.v1.TrainingService/"
WINDOW = 24
"""So many calls are under way at once, in any order."""
PAUSE_S_MAX = 0.05
LOSSES = pb.LossFn(cross_entropy=pb.CrossEntropyLoss())


@dataclass(frozen=True)
class Operation:
    """One numbered call; `request` has no model yet."""

    method: str
    request: Any

    def bytes_for(self, model_id: str) -> bytes:
        """The call as it goes over the wire."""
        request = type(self.request)()
        request.CopyFrom(self.request)
        request.model_id = model_id
        return bytes(request.SerializeToString(deterministic=True))


@dataclass
class Answers:
    """What came back, by number, and how many attempts it took."""

    messages: dict[int, list[bytes]] = field(default_factory=dict)
    attempts: int = 0


def make_operations(seed: int, count: int) -> list[Operation]:
    """A mix of forward_backward, forward and optim_step, numbered from 1; the last is a step."""
    rng = random.Random(seed)
    operations: list[Operation] = []
    for seq_id in range(1, count + 1):
        kind = rng.choice(["ForwardBackward", "ForwardBackward", "Forward", "OptimStep"])
        if kind == "OptimStep" or seq_id == count:
            adam = pb.AdamParams(learning_rate=rng.uniform(1e-4, 1e-2))
            step = pb.OptimStepRequest(seq_id=seq_id, adam_params=adam)
            operations.append(Operation("OptimStep", step))
        else:
            message = pb.ForwardRequest if kind == "Forward" else pb.ForwardBackwardRequest
            data = [make_datum([rng.randrange(256) for _ in range(rng.choice([2, 3]))])]
            request = message(seq_id=seq_id, loss_fn=LOSSES, data=data)
            operations.append(Operation(kind, request))
    return operations


def make_datum(tokens: Sequence[int]) -> Any:
    """Each token but the last predicts the next one."""
    inputs = {
        "target_tokens": tensors.encode(np.array(tokens[1:])),
        "weights": tensors.encode(np.ones(len(tokens) - 1, np.float32)),
    }
    chunk = pb.ModelInputChunk(tokens=tensors.encode(np.array(tokens[:-1])))
    return pb.Datum(model_input=pb.ModelInput(chunks=[chunk]), loss_fn_inputs=inputs)


def changed(operation: Operation) -> Operation:
    """Other content under the same number."""
    request = type(operation.request)()
    request.CopyFrom(operation.request)
    if operation.method == "OptimStep":
        request.adam_params.learning_rate += 1e-4
    else:
        request.data[0].CopyFrom(make_datum([1, 2, 3, 4]))
    return Operation(operation.method, request)


async def call_once(channel: grpc.aio.Channel, method: str, request: bytes) -> list[bytes]:
    """One attempt; the messages of the answer.

    Raises:
        grpc.aio.AioRpcError: It failed.
    """
    call = channel.stream_stream(SERVICE + method)(iter([request]))
    return [message async for message in call]


async def call_until_answered(
    channel: grpc.aio.Channel, method: str, request: bytes, answers: Answers
) -> list[bytes]:
    """Send the same bytes until there is an answer."""
    pause_s = 0.005
    while True:
        answers.attempts += 1
        try:
            return await call_once(channel, method, request)
        except grpc.aio.AioRpcError as error:
            codes = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
            if error.code() not in codes:
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_S_MAX)


async def apply_all(
    channel: grpc.aio.Channel, model_id: str, operations: Sequence[Operation], seed: int = 0
) -> Answers:
    """Send a sequence, `WINDOW` calls at a time, those in a shuffled order; returns the answers."""
    rng = random.Random(seed)
    answers = Answers()

    async def one(seq_id: int, operation: Operation) -> None:
        request = operation.bytes_for(model_id)
        messages = await call_until_answered(channel, operation.method, request, answers)
        answers.messages[seq_id] = messages

    waiting = list(enumerate(operations, 1))
    for start in range(0, len(waiting), WINDOW):
        block = waiting[start : start + WINDOW]
        rng.shuffle(block)
        await asyncio.gather(*(one(*numbered) for numbered in block))
    return answers

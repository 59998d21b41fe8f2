"""Makes samples: one call of `asample` is one promise, and has the same tokens whoever makes it."""

import hashlib
import json
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tinsmith import tensors
from tinsmith.gateway.v1 import tinker_pb2
from tinsmithd.gateway.cluster import SAMPLER, Work
from tinsmithd.gateway.problems import Problem, problem_of
from tinsmithd.gateway.tinker.promises import promise_id
from tinsmithd.gateway.tinker.room import Room
from tinsmithd.gateway.tinker.samples.answers import Answer, as_json
from tinsmithd.gateway.tinker.samples.completions import Completions
from tinsmithd.gateway.tinker.samples.requests import (
    Asked,
    derived_seed,
    read_sample,
    sequence_ids,
)
from tinsmithd.gateway.tinker.samples.weights import SamplingSession

if TYPE_CHECKING:
    from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceAsyncStub

KIND = "sample"
CARRIED_BYTES_MAX = 32 * 1024
"""A larger request is not carried by its promise, which is sent with every poll: a gateway that was
started since then says that it is lost, and the SDK sends it again."""
WHOLE = (("tinsmith-gather-s", "10"),)
"""Nobody sees a token before the last one is there."""
_ADDRESS = ("sampling_session_id", "seq_id", "base_model", "model_path", "type")


class Samples:
    """The calls of `asample`. Lives on one event loop.

    Args:
        room: Where the promises are.

    Attributes:
        completions: Which of them are done.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self.completions = Completions(room.promises)
        room.promises.add_kind(KIND, self._again, _read)

    def submit(
        self, session: SamplingSession, seq_id: int, body: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Take a call in; returns its promise.

        Raises:
            Problem: 400, naming the field; 429, too much is under way.
        """
        asked = read_sample(body)
        request_id = _promise(session, seq_id, body)
        if not self._room.promises.is_known(request_id):
            result = self._sample(request_id, session, seq_id, asked)
            self._room.promises.start(request_id, result, asked.request.ByteSize())
            self.completions.note(session, seq_id, request_id)
        count = asked.request.num_samples
        return {
            "request_id": request_id,
            "sample_sequence_ids": sequence_ids(session.sampler_id, seq_id, count),
        }

    def _again(self, content: Mapping[str, Any]) -> Awaitable[tinker_pb2.SampleResponse]:
        """Make a call of which nothing but its promise is known."""
        sampler_id, seq_id, body = content.get("s"), content.get("q"), content.get("b")
        if not isinstance(sampler_id, str) or type(seq_id) is not int:
            raise Problem(404, "request_id: there is no such request", field="request_id")
        session = SamplingSession.read(sampler_id)
        if not isinstance(body, dict):
            message = "this gateway was started after the request came, and it was too large to be "
            raise Problem(410, f"{message}carried by its promise; send it again")
        asked = read_sample(body)
        return self._sample(promise_id(KIND, content), session, seq_id, asked)

    async def _sample(
        self, request_id: str, session: SamplingSession, seq_id: int, asked: Asked
    ) -> tinker_pb2.SampleResponse:
        request, weights = asked.request, session.weights
        request.base_model = weights.base_model
        request.checkpoint_path = weights.checkpoint_path
        request.checkpoint_digest = weights.digest
        if not request.sampling_params.HasField("seed"):
            request.sampling_params.seed = derived_seed(session.sampler_id, seq_id)
        self._room.held.hold(session.session_id, weights.checkpoint_path)
        return await self._made(request_id, session, asked)

    async def _made(
        self, request_id: str, session: SamplingSession, asked: Asked
    ) -> tinker_pb2.SampleResponse:
        request, cluster = asked.request, self._room.cluster
        prompt = tensors.decode(request.prompt.chunks[0].tokens)
        weights = session.weights
        said = f"{weights.base_model} {weights.checkpoint_path} {weights.digest.hex()}"
        work = Work(said, np.asarray(prompt), request.num_samples)

        async def make(sampler: "SamplerServiceAsyncStub") -> tinker_pb2.SampleResponse:
            answer = Answer(request.num_samples, asked.layout)
            async for response in sampler.Sample(request, metadata=WHOLE):
                answer.add(response)
            return answer.message()

        async def attempt() -> tinker_pb2.SampleResponse:
            try:
                return await cluster.on_a_sampler(work, make)
            except Exception as error:
                problem = problem_of(error)
                if problem is not None and problem.retry_after_s is not None:
                    self._room.promises.pauses(request_id, problem.message)
                raise

        return await cluster.retrying("sample", attempt, service=SAMPLER)


def _read(answer: bytes) -> Mapping[str, Any]:
    return as_json(tinker_pb2.SampleResponse.FromString(answer))


def _promise(session: SamplingSession, seq_id: int, body: Mapping[str, Any]) -> str:
    """The promise of a call; the same for the same call."""
    asks = {name: value for name, value in body.items() if value and name not in _ADDRESS}
    content: dict[str, Any] = {"s": session.sampler_id, "q": seq_id, "b": asks}
    text = json.dumps(asks, separators=(",", ":"), sort_keys=True)
    if len(text) > CARRIED_BYTES_MAX:
        del content["b"]
        content["d"] = hashlib.sha256(text.encode()).hexdigest()
    return promise_id(KIND, content)

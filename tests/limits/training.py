"""The named limits of a Training server: a call at each, and one above it.

Settings are small, so that what is above them is quickly made; `docs/settings.md` has the defaults.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from limits.held import Limits
from scale.servers import Keys, Server, idle_ranks
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub
from training_calls import CROSS_ENTROPY, call, datum, tokens_of
from wire import limit_values

SETTINGS: dict[str, object] = {
    "data_per_call_max": 4,
    "chunks_max": 3,
    "loss_fn_inputs_max": 2,
    "call_bytes_max": 320_000,
    "message_bytes_max": 250_000,
    "message_items_max": 20_000,
    "targets_per_position_max": 2,
    "rank_max": 8,
    "lane_calls_max": 3,
    "lane_bytes_max": 350_000,
    "models_kept_max": 40,
    "concurrent_calls_max": 16,
    "peer_share_max": 1.0,
    "received_bytes_max": 10_000_000,
}
ELSEWHERE = {
    "received_bytes_max": "tests/unit/test_budget.py, tests/attack/test_streams.py",
    "peer_share_max": "tests/unit/test_budget.py",
    "stream_stall": "tests/attack/test_streams.py",
    "page_size_max": "tests/unit/test_limits.py",
    "ttl_max": "tests/service/test_training_refusals.py",
    "gap_wait_max": "tests/unit/test_lane.py",
    "answers_kept_max": "tests/unit/test_lane.py",
    "answer_bytes_kept_max": "tests/unit/test_lane.py",
    "journal_bytes_max": "tests/faults/test_recovery_disk.py",
    "call_attempts_max": "tests/faults/test_recovery.py",
    "models_max": "tests/service/test_models_max.py",
    "lease_id_characters_max": "tests/unit/test_limits.py",
    "steps_kept_max": "tests/service/test_steps.py",
    "tenant_models_max": "tests/service/test_key_limits.py",
    "tenant_queued_bytes_max": "tests/service/test_key_limits.py",
    "tenant_tokens_per_minute_max": "tests/service/test_key_limits.py",
}
"""Limits that are no matter of one request more, and who holds them."""
WAIT_S = 60.0


@contextlib.contextmanager
def training_limits(folder: Path) -> Iterator["TrainingLimits"]:
    """A server with small limits, whose ranks compute nothing, for the body of the `with`."""
    with Server("training", folder, Keys(folder), **SETTINGS) as server, idle_ranks(server):
        yield TrainingLimits(server)


class TrainingLimits(Limits):
    """Makes the calls.

    Args:
        server: Runs with `SETTINGS`, with ranks that compute nothing.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._stub, self._shown = server, server.stub, server.shown()
        self._made: list[str] = []
        capabilities = self._stub.GetCapabilities(pb.GetCapabilitiesRequest(), metadata=self._shown)
        values = {name: int(v) for name, v in limit_values(capabilities.limits).items()}
        cases: dict[str, Callable[[str, int], Any]] = {
            "data_per_call_max": lambda m, n: self._compute(m, data=[datum()] * n),
            "chunks_max": lambda m, n: self._compute(m, data=[_chunks(n)]),
            "loss_fn_inputs_max": lambda m, n: self._compute(m, data=[_inputs(n)]),
            "targets_per_position_max": lambda m, n: self._compute(m, data=[_targets(n)]),
            "call_bytes_max": self._call_bytes,
            "message_bytes_max": self._message,
            "message_items_max": self._items,
            "rank_max": lambda m, n: self._create(lora_config=pb.LoraConfig(rank=n)),
            "request_id_characters_max": lambda m, n: self._create(request_id="r" * n),
            "user_metadata_entries_max": lambda m, n: self._create(
                user_metadata={f"k{i}": "" for i in range(n)}
            ),
            "user_metadata_key_characters_max": lambda m, n: self._create(
                user_metadata={"k" * n: ""}
            ),
            "user_metadata_value_characters_max": lambda m, n: self._create(
                user_metadata={"k": "v" * n}
            ),
            "lane_calls_max": self._lane_calls,
            "lane_bytes_max": self._lane_bytes,
            "concurrent_calls_max": self._concurrent,
            "models_kept_max": self._models_kept,
        }
        on_model = {name: functools.partial(self._on_model, case) for name, case in cases.items()}
        super().__init__(server.process.pid, values, on_model)

    def prepare(self) -> None:
        """Make a model."""
        self._model_id = self._create()

    def _on_model(self, case: Callable[[str, int], Any], count: int) -> None:
        case(self._model_id, count)

    def tidy(self) -> None:
        """Delete the models."""
        for model_id in self._made:
            request = pb.DeleteModelRequest(model_id=model_id)
            self._stub.DeleteModel(request, metadata=self._shown)
        self._made = []

    # --- calls --------------------------------------------------------------------------------

    def _create(self, **fields: Any) -> str:
        request = pb.CreateModelRequest(**{"lora_config": pb.LoraConfig(rank=2), **fields})
        made = self._stub.CreateModel(request, metadata=self._shown).model.model_id
        self._made.append(made)
        return str(made)

    def _send(self, requests: Iterator[Any]) -> list[Any]:
        return list(self._stub.ForwardBackward(requests, metadata=self._shown, timeout=60))

    def _compute(self, model_id: str, seq_id: int = 0, **fields: Any) -> list[Any]:
        return self._send(iter([call(model_id, seq_id, **fields)]))

    def _call_bytes(self, model_id: str, nbytes: int) -> list[Any]:
        # Each message is small enough; all of them are one call.
        half = _long(5000)
        rest = self._fitting("call_bytes_max", nbytes - half.ByteSize(), pb.Datum.ByteSize)
        parts = [pb.ForwardBackwardRequest(model_id=model_id, loss_fn=CROSS_ENTROPY)]
        parts += [pb.ForwardBackwardRequest(data=[each]) for each in (half, rest)]
        return self._send(iter(parts))

    def _message(self, model_id: str, nbytes: int) -> list[Any]:
        one = self._fitting(
            "message_bytes_max", nbytes, lambda each: call(model_id, data=[each]).ByteSize()
        )
        return self._compute(model_id, data=[one])

    def _lane_bytes(self, model_id: str, nbytes: int) -> None:
        half = _long(7000)
        rest = self._fitting("lane_bytes_max", nbytes - half.ByteSize(), pb.Datum.ByteSize)
        self._park(model_id, [call(model_id, n, data=[one]) for n, one in ((2, half), (3, rest))])

    def _fitting(self, limit: str, nbytes: int, size: Callable[[pb.Datum], int]) -> pb.Datum:
        """The largest datum within so many bytes; the smallest beyond, where they are too many."""
        above = self.above == limit
        tokens = nbytes // 20
        while size(_long(tokens)) > nbytes:
            tokens -= 1
        while size(_long(tokens + 1)) <= nbytes:
            tokens += 1
        return _long(tokens + above)

    def _items(self, model_id: str, items: int) -> list[Any]:
        request = call(model_id)
        weights = request.data[0].loss_fn_inputs["weights"]
        # Fifty are enough for what is around the numbers.
        count = items if self.above else items - 50
        weights.CopyFrom(pb.Tensor(shape=[count], floats=[1.0] * count))
        try:
            return self._send(iter([request]))
        except grpc.RpcError as error:
            # Below the limit it is read, and refused for its shape.
            if "shape" in (error.details() or ""):  # type: ignore[attr-defined]
                return []
            raise

    def _lane_calls(self, model_id: str, count: int) -> None:
        self._park(model_id, [call(model_id, n) for n in range(2, count + 2)])

    def _park(self, model_id: str, requests: list[pb.ForwardBackwardRequest]) -> None:
        """Calls that wait for the first; the last of them comes when the others are there, and the
        first when that one is there, too, or was refused."""
        waiting = [self._begin(request) for request in requests[:-1]]
        while self._pending(model_id) < len(waiting):
            time.sleep(0.01)
        is_over = threading.Event()

        def compute() -> None:
            while self._pending(model_id) < len(requests) and not is_over.wait(0.05):
                pass
            self._compute(model_id, 1)

        first = threading.Thread(target=compute)
        first.start()
        try:
            with self.sending():
                list(self._begin(requests[-1]))
        finally:
            is_over.set()
            first.join()
            for each in waiting:
                list(each)

    def _pending(self, model_id: str) -> int:
        """Calls of a model that wait."""
        asked = pb.GetModelRequest(model_id=model_id)
        return int(self._stub.GetModel(asked, metadata=self._shown).model.pending_calls)

    def _begin(self, request: pb.ForwardBackwardRequest) -> Any:
        return self._stub.ForwardBackward(iter([request]), metadata=self._shown, timeout=60)

    def _concurrent(self, model_id: str, count: int) -> None:
        """Calls that wait for a number which never comes, of several models; and one more."""
        ids = [self._create() for _ in range(6)]
        waiting = [self._begin(call(ids[index // 3], 2 + index % 3)) for index in range(count - 1)]
        try:
            for each in waiting:
                each.initial_metadata()  # it has its place
            own = [("grpc.use_local_subchannel_pool", 1)]  # one connection holds no more streams
            with grpc.insecure_channel(self._server.address, own) as channel:
                stub = TrainingServiceStub(channel)
                grpc.channel_ready_future(channel).result(WAIT_S)
                with self.sending():
                    stub.ListModels(pb.ListModelsRequest(), metadata=self._shown)
        finally:
            for each in waiting:
                each.cancel()
            for each in waiting:
                each.code()  # waits for its end

    def _models_kept(self, model_id: str, count: int) -> None:
        listed = self._stub.ListModels(pb.ListModelsRequest(), metadata=self._shown)
        for _ in range(count - listed.total_size):
            with self.sending():
                self._create()


# --- data ---------------------------------------------------------------------------------------


def _chunks(count: int) -> pb.Datum:
    one = datum()
    del one.model_input.chunks[:]
    for start in range(count):
        part = [5 + start] if start < count - 1 else list(range(5 + start, 10))
        one.model_input.chunks.extend(tokens_of(part).chunks)
    length = count - 1 + max(0, 10 - 5 - (count - 1))
    one.loss_fn_inputs["target_tokens"].CopyFrom(tensors.encode(np.ones(length, np.int64)))
    one.loss_fn_inputs["weights"].CopyFrom(tensors.encode(np.ones(length, np.float32)))
    return one


def _inputs(count: int) -> pb.Datum:
    extra = {f"extra{n}": np.ones(5, np.float32) for n in range(count - 2)}
    return datum(**extra)


def _targets(count: int) -> pb.Datum:
    shape = (5, count)
    return datum(target_tokens=np.ones(shape, np.int64), weights=np.ones(shape, np.float32))


def _long(tokens: int) -> pb.Datum:
    """Twenty bytes for each token."""
    one = datum(target_tokens=np.ones(tokens, np.int64), weights=np.ones(tokens, np.float32))
    one.model_input.CopyFrom(pb.ModelInput(chunks=tokens_of([1]).chunks))
    one.model_input.chunks[0].tokens.CopyFrom(tensors.encode(np.ones(tokens, np.int64)))
    return one

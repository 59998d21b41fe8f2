"""The named limits of a Sampler."""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from checkpoints import messages, to_files
from faults.processes import Process
from limits.held import Case, Limits
from sampler_server import prompt, sample_request
from tinsmith import v1 as pb
from tinsmith.v1 import sampler_service_pb2
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmithd.domain import LoraConfig, ModelState
from wire import limit_values

MIB = 1024 * 1024
RANK = 4
COLUMNS = 900
RUNNING = 1
TRIES_MAX = 20
SETTINGS: dict[str, object] = {
    "message_bytes_max": 32 * MIB,
    "message_items_max": 20_000,
    "rank_max": RANK,
    "chunks_max": 3,
    "num_samples_max": 4,
    "sample_tokens_max": 490,
    "stops_max": 3,
    "stop_characters_max": 5,
    "topk_max": 3,
    "alternatives_max": 100,
    "running_max": RUNNING,
    "waiting_max": 2,
    "threads": 1,
}
ELSEWHERE = {
    "concurrent_calls_max": "tests/attack/test_streams.py",
    "received_bytes_max": "tests/unit/test_budget.py, tests/attack/test_streams.py",
    "peer_share_max": "tests/unit/test_budget.py",
    "stream_stall": "tests/attack/test_streams.py",
    "piece_bytes_max": "tests/service/test_tokenizer.py",
    "running_max": "tests/unit/test_sampler_admission.py",
    "kv_cache_bytes_max": "tests/conformance/test_embedded_engine.py",
    "adapters_max": "tests/unit/test_sampler_adapters.py",
    "adapters_bytes_max": "tests/unit/test_sampler_adapters.py",
    "tenant_samples_max": "tests/service/test_key_limits.py",
    "tenant_tokens_per_minute_max": "tests/service/test_key_limits.py",
}
"""Limits that are no matter of one request more, and who holds them."""


@contextlib.contextmanager
def sampler_limits(base_model: Path, folder: Path) -> Iterator["SamplerLimits"]:
    """A Sampler with small limits and a Checkpoint server, for the body of the `with`."""
    data: dict[str, object] = {"data_folder": folder / "data"}
    own = {
        "base_model": base_model,
        "dtype": "float32",
        "adapter_bytes_max": sum(map(len, _files(RANK, COLUMNS).values())),
    }
    with Process("checkpoint", folder, data) as checkpoint:
        target = {"checkpoint_target": f"127.0.0.1:{checkpoint.port}"}
        with (
            Process("sampler", folder, {**SETTINGS, **own, **target}) as sampler,
            grpc.insecure_channel(f"127.0.0.1:{sampler.port}") as channel,
            grpc.insecure_channel(f"127.0.0.1:{checkpoint.port}") as checkpoints,
        ):
            stub = SamplerServiceStub(channel)
            asked = sampler_service_pb2.SampleRequest(prompt=prompt([1]))
            asked.sampling_params.max_tokens = 1
            sampler.until(lambda: _serves(stub, asked))
            yield SamplerLimits(sampler, stub, CheckpointServiceStub(checkpoints))


def _serves(stub: SamplerServiceStub, asked: sampler_service_pb2.SampleRequest) -> bool:
    try:
        return bool(list(stub.Sample(asked)))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:  # type: ignore[attr-defined]
            raise
        return False


def _files(rank: int, columns: int) -> dict[str, bytes]:
    """An adapter, of no model that there is."""
    shapes = {"a.lora_A.weight": (rank, columns), "a.lora_B.weight": (6, rank)}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 32}
    return to_files(ModelState(LoraConfig(rank=rank), weights, {}, 3, about))


class SamplerLimits(Limits):
    """Makes the calls.

    Args:
        sampler: Runs with `SETTINGS`.
        stub: Calls it.
        checkpoints: Calls the Checkpoint server that it asks.
    """

    otherwise = ("message_bytes_max", "message_items_max", "rank_max", "adapter_bytes_max")

    def __init__(
        self, sampler: Process, stub: SamplerServiceStub, checkpoints: CheckpointServiceStub
    ) -> None:
        self._stub, self._checkpoints = stub, checkpoints
        request = sampler_service_pb2.SamplerServiceGetCapabilitiesRequest()
        told = stub.GetCapabilities(request).limits
        values = {name: int(value) for name, value in limit_values(told).items()}
        cases: Mapping[str, Case] = {
            "message_bytes_max": self._message_bytes,
            # Four bytes of text are one; fifty are enough for what is around them.
            "message_items_max": lambda n: self._sample(
                checkpoint_path="x" * 4 * (n if self.above else n - 50)
            ),
            "rank_max": lambda n: self._adapter(n, COLUMNS - 200),
            "chunks_max": self._chunks,
            "num_samples_max": lambda n: self._sample(num_samples=n),
            "sample_tokens_max": self._tokens,
            "stops_max": lambda n: self._stops(strings=["ab"] * n),
            "stop_characters_max": lambda n: self._stops(strings=["a" * n]),
            "topk_max": lambda n: self._sample(topk_prompt_logprobs=n),
            "waiting_max": self._waiting,
            "adapter_bytes_max": self._adapter_bytes,
            "alternatives_max": self._alternatives,
        }
        super().__init__(sampler.pid, values, cases)

    def _sample(self, **fields: Any) -> None:
        request = sample_request(**fields)
        with self.sending(request.ByteSize()):
            list(self._stub.Sample(request, timeout=60))

    def _message_bytes(self, nbytes: int) -> None:
        text = "x" * nbytes
        around = sample_request(checkpoint_path=text).ByteSize() - nbytes
        self._sample(checkpoint_path=text[around:])

    def _tokens(self, count: int) -> None:
        samples = 1 if self.above else 2
        length = count // samples
        params = {"max_tokens": length - 100}
        self._sample(prompt=prompt([1] * 100), num_samples=samples, params=params)

    def _chunks(self, count: int) -> None:
        whole = prompt([1])
        for token in range(2, count + 1):
            whole.chunks.extend(prompt([token]).chunks)
        self._sample(prompt=whole)

    def _stops(self, **stop: Any) -> None:
        self._sample(params={"stop": sampler_service_pb2.StopCondition(**stop)})

    def _alternatives(self, count: int) -> None:
        self._sample(prompt=prompt([1] * count), topk_prompt_logprobs=1)

    def _waiting(self, count: int) -> None:
        """All that may run and wait, at once; above, one more.

        Where there is little processor some have ended when the last one comes: then again.
        """
        for _ in range(TRIES_MAX if self.above else 1):
            self._together(count)

    def _together(self, count: int) -> None:
        params = {"max_tokens": 400}
        with ThreadPoolExecutor(RUNNING + count) as beside:
            calls = [beside.submit(self._sample, params=params) for _ in range(RUNNING + count)]
        for each in calls:
            each.result()

    def _adapter_bytes(self, nbytes: int) -> None:
        self._adapter(RANK, COLUMNS + bool(self.above))

    def _adapter(self, rank: int, columns: int) -> None:
        path = f"tinsmith://run-{rank}/sampler_weights/{columns}"
        lora = pb.LoraConfig(rank=rank)
        stream = messages(
            path, _files(rank, columns), lora_config=lora, base_model="tiny-llama", overwrite=True
        )
        self._checkpoints.WriteCheckpoint(stream)
        self._sample(checkpoint_path=path)

"""A Sampler with engine vllm through the wire, wired as in production."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

pytest.importorskip("vllm", reason="make test-vllm")

import programs
from data import make_data
from sampler_server import PATH, PROMPT, Served, prompt, sample_request, serving
from sampling_engines import HEAD_DIM, VLLM_START_S_MAX
from tinsmith.tensors import decode
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmithd.domain import AdamParams, CrossEntropy, LoraConfig, ModelState
from tinsmithd.modeling.base import load_base
from tinsmithd.sampler.server import SERVICE_NAME
from tinsmithd.trainer.engines.interface import Batch
from tinsmithd.trainer.engines.reference import ReferenceEngine
from tiny_models import write_tiny_model

SETTINGS = {"engine": "vllm", "dtype": "float32", "vllm_kv_cache_bytes_max": 1 << 26}

pytestmark = pytest.mark.timeout(VLLM_START_S_MAX)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("wire") / "tiny-llama", head_dim=HEAD_DIM)


@pytest.fixture
async def served(folder: Path, tmp_path: Path) -> AsyncIterator[Served]:
    """Both servers on free ports, the base model loaded."""
    async with serving(folder, tmp_path, **SETTINGS) as running:
        yield running


def trained_state(folder: Path) -> ModelState:
    trainer = ReferenceEngine(load_base(str(folder), dtype="float32", on_progress=print))
    trainer.create_model("m", LoraConfig(rank=4, seed=3))
    trainer.forward(Batch("m", make_data(0, 2), CrossEntropy(), backward=True), lambda *_: None)
    trainer.optim_step("m", AdamParams(learning_rate=3e-2))
    return trainer.export_state("m", optimizer=False)


async def test_a_call_of_each_kind(served: Served, folder: Path) -> None:
    """Samples with scores, an adapter by its path, scores alone, a cancelled call, capabilities."""
    request = sample_request(num_samples=3, include_prompt_logprobs=True, topk_prompt_logprobs=2)
    responses = [response async for response in served.stub.Sample(request)]
    scores = responses[0].prompt_logprobs
    assert not any(response.HasField("prompt_logprobs") for response in responses[1:])
    assert decode(scores.topk_token_ids).shape == (len(PROMPT), 2)
    base = await served.sample(num_samples=3)
    assert [(len(t), len(x), r) for t, x, r in base] == [(8, 8, pb.STOP_REASON_LENGTH)] * 3
    assert (await served.sample(num_samples=3)) == base

    await served.write(trained_state(folder))
    tuned = await served.sample(num_samples=3, checkpoint_path=PATH)
    assert [t for t, _, _ in tuned] != [t for t, _, _ in base]
    computed = await served.stub.ComputeLogprobs(
        pb.ComputeLogprobsRequest(prompt=prompt(PROMPT), checkpoint_path=PATH)
    )
    found = decode(computed.prompt_logprobs.logprobs)
    assert np.isnan(found[0])
    assert np.abs(found[1:] - decode(scores.logprobs)[1:]).max() > 1e-3

    call = served.stub.Sample(sample_request(num_samples=16, params={"max_tokens": 500}))
    async for _ in call:
        call.cancel()
        break
    admission = served.server._servicer.admission
    assert admission is not None
    async with asyncio.timeout(60):
        while admission.running:
            await asyncio.sleep(0.01)
    assert await served.sample(num_samples=3) == base

    capabilities = await served.stub.GetCapabilities(pb.SamplerServiceGetCapabilitiesRequest())
    assert [model.name for model in capabilities.base_models] == ["tiny-llama"]
    assert capabilities.engine == types_pb2.ENGINE_VLLM


def test_a_process_serves_and_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    """Killed, it takes vLLM's processes with it."""
    port_file = tmp_path / "port"
    flags = {**SETTINGS, "base_model": folder, "port_file": port_file}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    with (
        programs.Logged(
            tmp_path / "log", "tinsmithd.sampler", "--listen-address", "127.0.0.1:0", *arguments
        ) as running,
        grpc.insecure_channel(f"127.0.0.1:{running.port_in(port_file)}") as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=VLLM_START_S_MAX
        )
        for state in watch:
            if state.status == health_pb2.HealthCheckResponse.SERVING:
                break
        assert list(SamplerServiceStub(channel).Sample(sample_request()))
        below = descendants(running.pid)
        assert len(below) >= 2, "the core and a worker"
        running.kill()
    end_s = time.monotonic() + 30
    while alive := [pid for pid in below if is_alive(pid)]:
        assert time.monotonic() < end_s, alive
        time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    """Processes below one."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")

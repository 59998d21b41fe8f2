"""The Sampler as a process: it serves, ends, and says why it cannot start."""

import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import programs
from sampler_server import sample_request
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmithd.sampler.server import SERVICE_NAME

ARGUMENTS = ("tinsmithd.sampler", "--listen-address", "127.0.0.1:0")


def test_a_process_serves_and_ends_on_sigterm(tiny_model: Path, tmp_path: Path) -> None:
    """Health turns SERVING once the model is loaded; SIGTERM ends it with 0."""
    port_file = tmp_path / "port"
    arguments = ("--base-model", str(tiny_model), "--port-file", str(port_file))
    with (
        programs.Logged(tmp_path / "log", *ARGUMENTS, *arguments) as running,
        grpc.insecure_channel(f"127.0.0.1:{running.port_in(port_file)}") as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=120
        )
        for state in watch:
            if state.status == health_pb2.HealthCheckResponse.SERVING:
                break
        assert list(SamplerServiceStub(channel).Sample(sample_request()))
        running.signal(signal.SIGTERM)
        assert running.wait() == 0


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ((), 78, "sampler.base_model: must be set"),
        (("--base-model", "/nowhere/at-all"), 78, "/nowhere/at-all"),
        (
            ("--base-model", "/nowhere/at-all", "--engine", "vllm"),
            78,
            "sampler.engine: vllm is not installed; pip install 'tinsmith[vllm]'",
        ),
    ],
)
def test_a_process_that_cannot_start_says_why(args: tuple[str, ...], code: int, says: str) -> None:
    """One clear line, no stack trace, and a code that is not 0."""
    ended = programs.run(*ARGUMENTS, *args)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_configuration_of_the_wrong_types_is_refused(dtype: str, tmp_path: Path) -> None:
    """Also where it is read before the model is, to choose the element type."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    (tmp_path / "model.safetensors").touch()
    ended = programs.run(*ARGUMENTS, "--base-model", str(tmp_path), "--dtype", dtype)
    assert ended.returncode == 78, ended.stderr
    assert "hidden_size" in ended.stderr
    assert "Traceback" not in ended.stderr

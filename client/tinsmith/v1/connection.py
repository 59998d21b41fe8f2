"""Opens channels to the three services of a cluster, knowing one address."""

import os
from collections.abc import Sequence
from types import TracebackType

import grpc

from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmith.v1.training_service_pb2 import GetCapabilitiesRequest, GetCapabilitiesResponse
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
"""Channel arguments that suit the servers: message sizes in bytes, times in milliseconds."""


def has_port(address: str) -> bool:
    """Whether an address is `host:port`."""
    return address.rpartition(":")[2].isdigit()


def service_address(service: str, base: str, given: str) -> str:
    """Where a service is: as the environment says, else as GetCapabilities does.

    `TINSMITH_ADDRESS_SAMPLER` and `TINSMITH_ADDRESS_CHECKPOINT` are for a client that reaches the
    services by other names than the cluster knows, such as through `kubectl port-forward`.

    Args:
        service: `sampler` or `checkpoint`.
        base: The address that the capabilities came from, `host:port`.
        given: `sampler_address` or `checkpoint_address`. Empty means `base` (a proxy in front of
            all services); `:port` means that port on the host of `base`.

    Raises:
        ValueError: What the environment says is not `host:port`.
    """
    variable = f"TINSMITH_ADDRESS_{service.upper()}"
    if here := os.environ.get(variable):
        if not has_port(here):
            raise ValueError(f"{variable}: {here!r} is not host:port")
        return here
    if not given:
        return base
    if given.startswith(":"):
        return base.rpartition(":")[0] + given
    return given


class Cluster:
    """Blocking stubs for one cluster; a context manager that closes its channels.

    Attributes:
        training: Stub of TrainingService.
        sampler: Stub of SamplerService.
        checkpoint: Stub of CheckpointService.
        capabilities: What the Training server said of itself on connecting.
    """

    def __init__(self, address: str, timeout_s: float = 30.0) -> None:
        self._channels = [self._open(address)]
        self.training = TrainingServiceStub(self._channels[0])
        self.capabilities: GetCapabilitiesResponse = self.training.GetCapabilities(
            GetCapabilitiesRequest(), timeout=timeout_s, wait_for_ready=True
        )
        found = self.capabilities
        sampler = self._open(service_address("sampler", address, found.sampler_address))
        checkpoint = self._open(service_address("checkpoint", address, found.checkpoint_address))
        self._channels += [sampler, checkpoint]
        self.sampler = SamplerServiceStub(sampler)
        self.checkpoint = CheckpointServiceStub(checkpoint)

    @staticmethod
    def _open(address: str) -> grpc.Channel:
        return grpc.insecure_channel(address, options=list(CHANNEL_OPTIONS))

    def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def connect(address: str, timeout_s: float = 30.0) -> Cluster:
    """Connect to a cluster.

    Args:
        address: `host:port` of its Training server.
        timeout_s: How long to wait until it answers, seconds.

    Raises:
        grpc.RpcError: It did not answer in time (DEADLINE_EXCEEDED) or refused.
    """
    return Cluster(address, timeout_s)

"""Blocking stubs for the three services of a cluster, knowing one address.

from tinsmith import v1
from tinsmith.cluster import connect

with connect("localhost:50051") as cluster:
    info = cluster.training.GetCapabilities(v1.GetCapabilitiesRequest())
"""

import grpc

from tinsmith import _fork
from tinsmith.addresses import SECURE, channel_options, hosts_of, proxy_note, service_address
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmith.v1.training_service_pb2 import GetCapabilitiesRequest, GetCapabilitiesResponse
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub


class Cluster:
    """Blocking stubs for one cluster; a context manager that closes its channels.

    Attributes:
        capabilities: What the Training server said of itself on connecting.
    """

    def __init__(self, address: str, timeout_s: float = 30.0) -> None:
        self._channels = [self._open(address)]
        self._training = TrainingServiceStub(self._channels[0])
        try:
            self.capabilities: GetCapabilitiesResponse = self.training.GetCapabilities(
                GetCapabilitiesRequest(), timeout=timeout_s, wait_for_ready=True
            )
        except grpc.RpcError as error:
            if note := proxy_note(address):
                error.add_note(note)
            self.close()
            raise
        found = self.capabilities
        samplers = hosts_of(service_address("sampler", address, found.sampler_address))
        sampler = self._open(samplers[0])
        checkpoint = self._open(service_address("checkpoint", address, found.checkpoint_address))
        self._channels += [sampler, checkpoint]
        self._sampler = SamplerServiceStub(sampler)
        self._checkpoint = CheckpointServiceStub(checkpoint)

    @staticmethod
    def _open(address: str) -> grpc.Channel:
        _fork.use()
        options = list(channel_options(address))
        if not address.startswith(SECURE):
            return grpc.insecure_channel(address, options=options)
        credentials = grpc.ssl_channel_credentials()
        return grpc.secure_channel(address.removeprefix(SECURE), credentials, options=options)

    @property
    def training(self) -> TrainingServiceStub:
        """Stub of TrainingService."""
        _fork.check()
        return self._training

    @property
    def sampler(self) -> SamplerServiceStub:
        """Stub of SamplerService; of the first one where the cluster names several."""
        _fork.check()
        return self._sampler

    @property
    def checkpoint(self) -> CheckpointServiceStub:
        """Stub of CheckpointService."""
        _fork.check()
        return self._checkpoint

    def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        _fork.check()
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(address: str, timeout_s: float = 30.0) -> Cluster:
    """Connect to a cluster.

    Args:
        address: `host:port` of its Training server, or `https://host:port`.
        timeout_s: How long to wait until it answers, seconds.

    Raises:
        grpc.RpcError: It did not answer in time (DEADLINE_EXCEEDED) or refused; a note says where a
            proxy stands in between.
        FailedPreconditionError: This process was forked from one that had used tinsmith (FORKED).
    """
    return Cluster(address, timeout_s)

"""Blocking stubs for the three services of a cluster, knowing one address.

from tinsmith import v1
from tinsmith.cluster import connect

with connect("localhost:50051") as cluster:
    info = cluster.training.GetCapabilities(v1.GetCapabilitiesRequest())
"""

import grpc

from tinsmith import _fork
from tinsmith._tls_trouble import trouble
from tinsmith.addresses import SPREAD, hosts_of, proxy_note, service_address
from tinsmith.channels import TlsFiles, open_channel, warn_of_plain_text
from tinsmith.errors import InvalidArgumentError
from tinsmith.keys import showing, shown_of
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmith.v1.training_service_pb2 import GetCapabilitiesRequest, GetCapabilitiesResponse
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub


class Cluster:
    """Blocking stubs for one cluster; a context manager that closes its channels.

    Attributes:
        capabilities: What the Training server said of itself on connecting.
    """

    def __init__(
        self, address: str, timeout_s: float = 30.0, *, api_key: str | None = None
    ) -> None:
        self._shown = shown_of(api_key)
        warn_of_plain_text(address, self._shown)
        self._tls = TlsFiles.of_environment()
        self._channels = [self._open(address)]
        self._training = TrainingServiceStub(self._channels[0])
        try:
            self.capabilities: GetCapabilitiesResponse = self._ask(address, timeout_s)
        except grpc.RpcError as error:
            if note := proxy_note(address):
                error.add_note(note)
            self.close()
            raise
        except InvalidArgumentError:
            self.close()
            raise
        found = self.capabilities
        if found.training_address:
            training = service_address("training", address, found.training_address)
            self._channels.append(self._open(training))
            self._training = TrainingServiceStub(self._channels[-1])
        samplers = hosts_of(service_address("sampler", address, found.sampler_address))
        sampler = self._open(samplers[0])
        checkpoints = service_address("checkpoint", address, found.checkpoint_address)
        checkpoint = self._open(checkpoints, SPREAD)
        self._channels += [sampler, checkpoint]
        self._sampler = SamplerServiceStub(sampler)
        self._checkpoint = CheckpointServiceStub(checkpoint)

    def _ask(self, address: str, timeout_s: float) -> GetCapabilitiesResponse:
        request = GetCapabilitiesRequest()
        try:  # one that does not wait hears of what waiting does not mend
            return self.training.GetCapabilities(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            text = error.details() or ""
        if message := trouble(text, address, self._tls):
            raise InvalidArgumentError(message, field="address")
        return self.training.GetCapabilities(request, timeout=timeout_s, wait_for_ready=True)

    def _open(self, address: str, *more: tuple[str, str]) -> grpc.Channel:
        _fork.use()
        return showing(open_channel(address, self._tls, more), self._shown)

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


def connect(address: str, timeout_s: float = 30.0, *, api_key: str | None = None) -> Cluster:
    """Connect to a cluster.

    Args:
        address: `host:port` of its Training server, or `https://host:port` (`tinsmith.channels`).
        timeout_s: How long to wait until it answers, seconds.
        api_key: As in `ServiceClient`.

    Raises:
        InvalidArgumentError: It speaks TLS and the address does not say so, or the other way; its
            certificate is not trusted; or a file of `tinsmith.channels` cannot be used.
        grpc.RpcError: It did not answer in time (DEADLINE_EXCEEDED) or refused; a note says where a
            proxy stands in between.
        FailedPreconditionError: This process was forked from one that had used tinsmith (FORKED).
    """
    return Cluster(address, timeout_s, api_key=api_key)

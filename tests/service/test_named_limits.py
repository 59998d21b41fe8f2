"""Each named limit of each server: at its value a call passes, one above is refused by name.

Memory is not taken for what is refused. `make scale` says how long a refusal takes.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import Descriptor

from clusters import RunningCluster
from limits import checkpoint, gateway, sampler, training
from limits.checkpoint import CheckpointLimits, checkpoint_limits
from limits.gateway import GatewayLimits, gateway_limits
from limits.held import Limits
from limits.sampler import SamplerLimits, sampler_limits
from limits.training import TrainingLimits, training_limits
from tinsmith import v1 as pb

ROOT = Path(__file__).parents[2]
GREW_BYTES_MAX = 16 * 1024 * 1024
"""What a server may take for a call that it refuses; what would be too many bytes are 32 MiB."""
REFUSED = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "400", "413", "429")
COPIES_MAX = 4
"""Of a message that is little too large: it is received, so that its refusal can say why."""


@pytest.fixture(scope="module")
def of_training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingLimits]:
    with training_limits(tmp_path_factory.mktemp("training")) as limits:
        yield limits


@pytest.fixture(scope="module")
def of_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointLimits]:
    with checkpoint_limits(tmp_path_factory.mktemp("checkpoint")) as limits:
        yield limits


@pytest.fixture(scope="module")
def of_sampler(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SamplerLimits]:
    with sampler_limits(tiny_model, tmp_path_factory.mktemp("sampler")) as limits:
        yield limits


@pytest.fixture(scope="module")
def of_gateway(
    cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayLimits]:
    with gateway_limits(cluster.address, tmp_path_factory.mktemp("gateway")) as limits:
        yield limits


def all_are_held(told: Collection[str], limits: Limits, elsewhere: Mapping[str, str]) -> None:
    """A new one needs a case in `limits`, or the name of the test that holds it."""
    assert set(told) == {*limits.names, *elsewhere}
    assert not set(limits.names) & set(elsewhere)
    files = {name for names in elsewhere.values() for name in names.split(", ")}
    assert all((ROOT / name).exists() for name in files)


def fields(message: Descriptor) -> set[str]:
    return {field.name for field in message.fields}


def are_held(limits: Limits) -> None:
    """Each with its own name, and before memory is taken."""
    for name in limits.names:
        held = limits.hold(name)
        assert held.refusal.status in REFUSED, held
        assert held.refusal.limit == name, held
        copies = COPIES_MAX if name == "message_bytes_max" else 0
        assert held.grew_bytes <= GREW_BYTES_MAX + copies * held.refused_bytes, held


def test_every_limit_of_a_training_server_is_held(of_training: TrainingLimits) -> None:
    all_are_held(fields(pb.TrainingLimits.DESCRIPTOR), of_training, training.ELSEWHERE)
    are_held(of_training)


def test_every_limit_of_a_checkpoint_server_is_held(of_checkpoint: CheckpointLimits) -> None:
    all_are_held(fields(pb.CheckpointLimits.DESCRIPTOR), of_checkpoint, checkpoint.ELSEWHERE)
    are_held(of_checkpoint)


def test_every_limit_of_a_sampler_is_held(of_sampler: SamplerLimits) -> None:
    all_are_held(fields(pb.SamplerLimits.DESCRIPTOR), of_sampler, sampler.ELSEWHERE)
    are_held(of_sampler)


def test_every_limit_of_a_gateway_is_held(of_gateway: GatewayLimits) -> None:
    all_are_held(gateway.NAMES, of_gateway, gateway.ELSEWHERE)
    are_held(of_gateway)


def test_a_message_far_above_its_limit_is_not_received(of_checkpoint: CheckpointLimits) -> None:
    """gRPC refuses what says that it is more than twice as large."""
    nbytes = 2 * of_checkpoint.values["message_bytes_max"] + 1
    status, grew_bytes = of_checkpoint.grew_by(lambda: of_checkpoint.get("x" * nbytes))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert grew_bytes <= GREW_BYTES_MAX

"""Training server and ranks of two releases: what they say of themselves, and what follows."""

import time
from collections.abc import Iterator

import grpc
import pytest

from faults.processes import Training
from tinsmith import v1 as pb
from tinsmith.internal.v1 import trainer_link_service_pb2 as link
from tinsmith.internal.v1.trainer_link_service_pb2_grpc import TrainerLinkServiceStub
from tinsmithd.rpc import link_secret, link_version
from tinsmithd.trainer.commands import Commands
from tinsmithd.training.ranks.claims import GroupClaim
from tinsmithd.training.ranks.rank_group import AttachedRankGroup
from wire import reason_and_field

LATER = bytes([15 << 3, 1])
"""A field of a later release, in any message: number 15, the value 1."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A Training server without ranks."""
    folder = tmp_path_factory.mktemp("link")
    with Training(folder, folder) as running:
        yield running


def hello(**more: object) -> link.AttachRequest:
    base = pb.BaseModel(
        name="m",
        architecture="llama",
        vocab_size=1,
        context_length=1,
        layer_count=1,
        parameter_count=1,
        dtype=pb.Dtype.DTYPE_FLOAT32,
    )
    said = link.Hello(base_model=base, world_size=1, engine="none", **more)  # type: ignore[arg-type]
    return link.AttachRequest(hello=said)


def attach(server: Training, request: link.AttachRequest) -> link.AttachResponse:
    """The first thing that the server says to this hello."""

    def requests() -> Iterator[link.AttachRequest]:
        yield request
        while not over:
            time.sleep(0.01)

    over: list[bool] = []
    secret = link_secret.read(server.data / "link.secret", link_secret.RANKS_KEY)
    with grpc.insecure_channel(f"127.0.0.1:{server.server.link_port}") as channel:
        call = TrainerLinkServiceStub(channel).Attach(
            requests(), metadata=link_secret.shown(secret), timeout=60
        )
        try:
            return next(call)
        finally:
            over.append(True)
            call.cancel()


def test_ranks_of_another_major_version_are_refused_with_a_sentence(server: Training) -> None:
    """It says both versions, both releases and which end to upgrade; callers that wait for ranks
    hear it, too."""
    later = link.LinkVersion(major=2, minor=3)
    with pytest.raises(grpc.RpcError) as refused:
        attach(server, hello(link_version=later, release="9.1.0"))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_and_field(refused.value)[1] == "hello.link_version"
    sentence = refused.value.details()
    for part in (
        "2.3 of release 9.1.0",
        f"speaks 1.{link_version.MINOR}",
        "upgrade the Training server",
    ):
        assert part in sentence
    with grpc.insecure_channel(server.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        with pytest.raises(grpc.RpcError) as waits:
            stub.CreateModel(pb.CreateModelRequest(base_model="m"), timeout=60)
    assert waits.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "upgrade the Training server" in waits.value.details()


@pytest.mark.parametrize(
    "version",
    [None, link.LinkVersion(major=1), link.LinkVersion(major=1, minor=99)],
)
def test_ranks_of_the_same_major_version_are_welcome(
    server: Training, version: link.LinkVersion | None
) -> None:
    """Those of the first release, which say none, and later ones with fields that are not known
    here; the welcome says what the server is."""
    request = hello(link_version=version, release="0.9.9")
    request = link.AttachRequest.FromString(request.SerializeToString() + LATER)
    welcome = attach(server, request).welcome
    said = (welcome.link_version.major, welcome.link_version.minor)
    assert said == (1, link_version.MINOR)
    assert welcome.release
    server.server.until(lambda: server.server.says("release 0.9.9"))


def test_a_command_that_ranks_do_not_know_fails_and_ends_nobody() -> None:
    """Several ranks stay in step: none of them knows it."""
    engines: object = None
    replies: list[link.AttachRequest] = []
    commands = Commands(engines, world_size=2)  # type: ignore[arg-type]
    command = link.AttachResponse(command_id=7)
    command = link.AttachResponse.FromString(command.SerializeToString() + LATER)
    commands.apply(command, replies.append)
    assert [(reply.command_id, reply.WhichOneof("content")) for reply in replies] == [(7, "failed")]


def test_what_later_ranks_say_besides_costs_them_nothing() -> None:
    """A content that this server does not know is passed over; nothing at all is nonsense still."""
    group = AttachedRankGroup(GroupClaim.of(hello().hello), time.monotonic)
    taken: list[link.AttachRequest] = []
    group._replies[3] = type("Queue", (), {"put_nowait": lambda _, each: taken.append(each)})()
    message = link.AttachRequest(command_id=3)
    group.answered(link.AttachRequest.FromString(message.SerializeToString() + LATER))
    assert taken == []
    group.answered(message)
    assert taken == [message]

"""The rank link: nobody becomes the trainer who cannot show the secret, and nobody who can is
believed more than a rank group must be."""

import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

import tinsmith
from attack.hostile_states import STATES
from clusters import RunningCluster
from faults.processes import Training
from tinsmith import types
from tinsmith import v1 as pb
from tinsmith.internal.v1 import trainer_link_service_pb2 as link_pb
from tinsmith.v1 import types_pb2
from tinsmithd.rpc import link_secret

ATTACH = "/tinsmith.internal.v1.TrainerLinkService/Attach"
LEASE_S = 8
"""The cluster's own ranks say every two seconds that they are there, on a busy machine later."""
WAIT_S = 60
HELLO = link_pb.Hello(
    base_model=pb.BaseModel(
        name="stolen",
        architecture="LlamaForCausalLM",
        vocab_size=300,
        context_length=64,
        dtype=pb.Dtype.DTYPE_FLOAT32,
        layer_count=1,
        parameter_count=1,
    ),
    world_size=1,
    engine="reference",
    identity={"base_model": "stolen", "dtype": "float32", "device": "cpu"},
)


def with_pid(hello: link_pb.Hello, pid: int) -> bytes:
    """A hello as the release before took it: field 5 was the process id of rank 0."""
    data = hello.SerializeToString() + bytes([5 << 3])
    while pid > 127:
        data, pid = data + bytes([pid & 127 | 128]), pid >> 7
    data += bytes([pid])
    request = link_pb.AttachRequest.FromString(b"")
    request.hello.ParseFromString(data)
    return request.SerializeToString()


class Stream:
    """One stream of an attacker: what it sends are bytes, and it never ends by itself."""

    def __init__(
        self,
        address: str,
        messages: Iterable[bytes],
        metadata: Sequence[tuple[str, str]] = (),
        method: str = ATTACH,
    ) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        for message in messages:
            self._outgoing.put(message)
        self._channel = grpc.insecure_channel(address)
        self._call: Any = self._channel.stream_stream(method)(
            iter(self._outgoing.get, None), metadata=metadata, timeout=WAIT_S
        )

    def say(self, **content: Any) -> None:
        """Send a message."""
        self._outgoing.put(link_pb.AttachRequest(**content).SerializeToString())

    def next(self) -> link_pb.AttachResponse:
        """What the server says next."""
        return link_pb.AttachResponse.FromString(next(self._call))

    def end(self) -> grpc.RpcError | None:
        """How the server ends it: with an error, or None."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as error:
            return error
        return None

    @property
    def open(self) -> bool:
        """Whether the server has not ended it."""
        return bool(self._call.is_active())

    def close(self) -> None:
        """Go away."""
        self._outgoing.put(None)
        self._call.cancel()
        self._channel.close()


@contextmanager
def attached(*arguments: Any, **more: Any) -> Iterator[Stream]:
    stream = Stream(*arguments, **more)
    try:
        yield stream
    finally:
        stream.close()


def code_of(stream: Stream) -> grpc.StatusCode | None:
    error = stream.end()
    return None if error is None else error.code()


def hello(**fields: Any) -> bytes:
    message = link_pb.Hello.FromString(HELLO.SerializeToString())
    for name, value in fields.items():
        if isinstance(value, dict):
            getattr(message, name).update(value)
        else:
            setattr(message, name, value)
    return link_pb.AttachRequest(hello=message).SerializeToString()


# --- a cluster with its own ranks -------------------------------------------------------------


class Victim:
    """A cluster of `tinsmith up` with one user, and where its ranks attach."""

    def __init__(self, cluster: RunningCluster, folder: Path) -> None:
        self.cluster = cluster
        self.link = f"127.0.0.1:{(folder / 'link-port').read_text().strip()}"
        secret_file = cluster.logs.parent / "training" / link_secret.FILE_NAME
        self.secret = link_secret.read(secret_file, "here")
        service = tinsmith.ServiceClient(base_url=cluster.address)
        self._model = service.create_lora_training_client(cluster.base_model, rank=2).result(60)
        self.ranks = list(cluster.rank_pids())
        self.loss = self.step()

    def step(self) -> float:
        """What a forward gives: always the same."""
        datum = types.Datum(
            types.ModelInput.from_ints([1, 2, 3]),
            {"target_tokens": np.array([2, 3, 4]), "weights": np.ones(3, np.float32)},
        )
        return float(self._model.forward([datum], "cross_entropy").result(60).loss)

    def assert_unharmed(self) -> None:
        """Its ranks are the same processes, and its user's numbers the same."""
        assert list(self.cluster.rank_pids()) == self.ranks
        assert self.step() == self.loss


@pytest.fixture(scope="module")
def victim(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("victim")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_TRAINING_RANK_LEASE_S", str(LEASE_S))
        patch.setenv("TINSMITH_TRAINING_LINK_PORT_FILE", str(folder / "link-port"))
        with RunningCluster(tiny_model, folder, engine="reference") as cluster:
            yield Victim(cluster, folder)


def test_the_port_of_clients_does_not_serve_the_rank_link(victim: Victim) -> None:
    """Not even to who has the secret; and what is told of the port does not name it."""
    shown = link_secret.shown(victim.secret)
    for metadata in ((), shown):
        with attached(victim.cluster.address, [hello()], metadata) as stream:
            assert code_of(stream) is grpc.StatusCode.UNIMPLEMENTED
    victim.assert_unharmed()


def not_secrets(secret: str) -> dict[str, Sequence[tuple[str, str]]]:
    key = link_secret.METADATA_KEY
    return {
        "none": (),
        "empty": ((key, "Bearer "),),
        "wrong": ((key, "Bearer " + "0" * len(secret)),),
        "beginning": ((key, f"Bearer {secret[:-1]}"),),
        "longer": ((key, f"Bearer {secret}0"),),
        "bare": ((key, secret),),
        "other scheme": ((key, f"Basic {secret}"),),
        "twice": ((key, f"Bearer {secret}"), (key, "Bearer x")),
        "other key": (("secret", secret),),
        "long": ((key, "Bearer " + "x" * 6000),),
    }


def test_a_stream_without_the_secret_is_refused_before_anything_of_it_is_read(
    victim: Victim,
) -> None:
    """Whatever it shows, says or asks for; rank 0's process id helps nobody, silence neither."""
    impersonation = with_pid(HELLO, victim.ranks[0])
    garbage = b"\xff" * 1000
    for metadata in not_secrets(victim.secret).values():
        for messages in ([impersonation], [garbage], []):
            with attached(victim.link, messages, metadata) as stream:
                error = stream.end()
                assert error is not None
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "trainer.link_secret_file" in (error.details() or "")
                assert victim.secret not in (error.details() or "")
    for method in (
        "/grpc.health.v1.Health/Watch",
        "/x.Y/Z",
        "/tinsmith.v1.TrainingService/Forward",
    ):
        with attached(victim.link, [b""], method=method) as stream:
            assert code_of(stream) is grpc.StatusCode.UNAUTHENTICATED
    victim.assert_unharmed()


def test_a_server_ends_only_processes_that_it_started(victim: Victim) -> None:
    """A group that has the secret and falls silent loses its place: it names rank 0's process id,
    or guesses a token, and nobody dies. Another one does not get the place of the one at work."""
    shown = link_secret.shown(victim.secret)
    silent = [
        with_pid(HELLO, victim.ranks[0]),
        hello(launch_token=str(victim.ranks[0])),
        hello(launch_token=victim.secret),
        hello(),
    ]
    streams = [Stream(victim.link, [message], shown) for message in silent]
    try:
        with attached(victim.link, [hello()], shown) as second:
            end_s = time.monotonic() + WAIT_S
            while any(stream.open for stream in streams):
                second.say(alive=link_pb.Alive())
                assert time.monotonic() < end_s
                time.sleep(LEASE_S / 4)
            assert second.open  # it stands by, and was not welcomed
            victim.assert_unharmed()
    finally:
        for stream in streams:
            stream.close()
    log = (victim.cluster.logs / "training.log").read_text()
    assert f"said nothing for {LEASE_S} s" in log
    assert "a rank group ended" not in log


def test_nobody_else_reads_the_secret(victim: Victim) -> None:
    """Not from its file, nor from a command line, nor from a log."""
    data = victim.cluster.logs.parent
    assert (data / "training" / link_secret.FILE_NAME).stat().st_mode & 0o077 == 0
    for pid in [victim.cluster.pid("training"), *victim.ranks]:
        assert victim.secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for log in victim.cluster.logs.iterdir():
        assert victim.secret not in log.read_text()


# --- a server that waits for ranks: the attacker has the secret --------------------------------


@pytest.fixture(scope="module")
def waiting(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    with Training(tiny_model, tmp_path_factory.mktemp("waiting"), durability="none") as running:
        yield running


def knowing(waiting: Training, *messages: bytes) -> Stream:
    """A stream that shows the secret."""
    secret = link_secret.read(waiting.data / link_secret.FILE_NAME, "here")
    shown = link_secret.shown(secret)
    return Stream(f"127.0.0.1:{waiting.server.link_port}", messages, shown)


def create(waiting: Training) -> Any:
    """A user's call that needs the ranks; returns a future."""
    channel = grpc.insecure_channel(waiting.address)
    stub = pb.TrainingServiceStub(channel)
    lora = pb.LoraConfig(rank=2, seed=1)
    return stub.CreateModel.future(pb.CreateModelRequest(lora_config=lora), timeout=WAIT_S)


def test_what_a_rank_says_is_cut_and_escaped_before_it_is_shown(waiting: Training) -> None:
    """Progress of a megabyte with line ends in it: one short line, for callers and in the log."""
    forged = "\n12:00:00 training ERROR forged " + "x" * 1_000_000
    stream = knowing(
        waiting,
        link_pb.AttachRequest(loading=link_pb.Loading(message=forged)).SerializeToString(),
    )
    waiting.server.until(lambda: waiting.server.says("forged"))
    error = create(waiting).exception()
    stream.close()
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "forged" in error.details()
    assert len(error.details()) < 600
    assert error.details().isprintable()
    for line in waiting.server.log.read_text().splitlines():
        assert not line.startswith("12:00:00 training ERROR forged")
        assert len(line) < 1000


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("hello.world_size", {"world_size": 0}),
        ("hello.world_size", {"world_size": -1}),
        ("hello.world_size", {"world_size": 2**31 - 1}),
        ("hello.engine", {"engine": "x" * 10_000}),
        ("hello.engine", {"engine": "a\nb"}),
        ("hello.launch_token", {"launch_token": "x" * 10_000}),
        ("hello.identity", {"identity": {str(n): "x" for n in range(1000)}}),
        ("hello.identity", {"identity": {"a\nb": "x"}}),
        ('hello.identity["k"]', {"identity": {"k": "x" * 100_000}}),
        ("hello.base_model.vocab_size", {"base_model": None}),
    ],
)
def test_an_impossible_hello_is_refused_by_field(
    waiting: Training, field: str, fields: dict[str, Any]
) -> None:
    """It gets no place, and nothing of it is kept."""
    message = hello(**{k: v for k, v in fields.items() if v is not None})
    if "base_model" in fields:
        bare = link_pb.Hello.FromString(HELLO.SerializeToString())
        bare.base_model.vocab_size = 0
        message = link_pb.AttachRequest(hello=bare).SerializeToString()
    stream = knowing(waiting, message)
    error = stream.end()
    stream.close()
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = rpc_status.from_call(error).details
    bad = error_details_pb2.BadRequest()
    assert any(any_.Unpack(bad) for any_ in details)
    assert bad.field_violations[0].field == field


def failed(reason: str, code: int) -> link_pb.Failed:
    """A failure with a status that a server could send, but for what is in it."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="tinsmith"))
    status = status_pb2.Status(code=code, message="no", details=[detail])
    return link_pb.Failed(status=status.SerializeToString())


NONSENSE = {
    "outputs of what computes nothing": {"outputs": link_pb.DatumOutputs(outputs=[b"x"])},
    "a piece of no state": {"piece": link_pb.StatePiece(file_name="../x", data=b"x")},
    "nothing at all": {},
    "a failure without a status": {"failed": link_pb.Failed()},
    "a status that is none": {"failed": link_pb.Failed(status=b"\xff" * 9999)},
    "a code that is no error": {"failed": failed("INTERNAL", code=0)},
    "a code that there is not": {"failed": failed("INTERNAL", code=99)},
    "a reason that there is not": {"failed": failed("x" * 9999, code=5)},
    "a reason of another code": {"failed": failed("MODEL_NOT_FOUND", code=14)},
}


@pytest.mark.parametrize("content", NONSENSE.values(), ids=NONSENSE)
def test_an_answer_that_no_command_has_costs_the_group_its_place(
    waiting: Training, content: dict[str, Any]
) -> None:
    """The caller hears that the ranks are gone, never the nonsense; the next group is welcomed."""
    stream = knowing(waiting, hello())
    welcome = stream.next()
    assert welcome.welcome.epoch > 0
    call = create(waiting)
    command = stream.next()
    assert command.HasField("create_model")
    stream.say(command_id=command.command_id, **content)
    assert stream.end() is None
    stream.close()
    assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
    assert waiting.server.says("the rank group's reply makes no sense")
    following = knowing(waiting, hello())
    assert following.next().welcome.epoch > welcome.welcome.epoch
    following.close()


@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_no_file_that_a_rank_names_leads_out_of_a_folder(
    waiting: Training, content: dict[str, Any]
) -> None:
    """The files of a state are named by rank 0: a name that is none costs it its place, and so does
    a deposit that it was not given."""
    stream = knowing(waiting, hello())
    assert stream.next().HasField("welcome")
    call = create(waiting)
    command = stream.next()
    stream.say(command_id=command.command_id, done=link_pb.Done())
    model_id = call.result(WAIT_S).model.model_id
    stub = pb.TrainingServiceStub(grpc.insecure_channel(waiting.address))
    kind = types_pb2.CHECKPOINT_KIND_TRAINING
    request = pb.SaveCheckpointRequest(model_id=model_id, name="x", kind=kind)
    save = stub.SaveCheckpoint.future(request, timeout=WAIT_S)
    command = stream.next()
    assert command.HasField("copy_state")
    stream.say(command_id=command.command_id, copied=link_pb.Copied())
    stream.say(command_id=command.command_id, **content)
    assert stream.end() is None
    stream.close()
    assert save.exception().code() is grpc.StatusCode.DATA_LOSS  # nothing of it was written down
    assert waiting.server.says("makes no sense: a file ")

"""Silent and endless streams, half messages, half calls, readers that never read.

Settings are smaller than the defaults only where the test would else take minutes or gigabytes.
"""

import contextlib
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2_grpc
from grpc_status import rpc_status

import checkpoints
from attack.amount import amount
from attack.harness import MIB, target_of, watching
from attack.raw import END_STREAM, HEADERS, Peer, message
from clusters import until_health
from faults.processes import Process, Training
from tinsmith import tensors
from tinsmith import v1 as pb_all
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub
from wire import reason_and_field

STALL_S = 3.0
CALLS_MAX = 1024
SERVICE = "tinsmith.v1.CheckpointService"
CROSS_ENTROPY = pb_all.LossFn(cross_entropy=pb_all.CrossEntropyLoss())
LIST = pb.ListCheckpointsRequest().SerializeToString()
OTHER_HOST = "127.0.0.2"
STALLED = b"stream_stall_s"


def process(kind: str, folder: Path, **settings: object) -> Process:
    """A server whose streams may stall for `STALL_S`."""
    return Process(kind, folder, {"stream_stall_s": STALL_S, **settings})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A Checkpoint server that nobody else uses."""
    folder = tmp_path_factory.mktemp("streams")
    settings = {"data_folder": folder / "data", "concurrent_calls_max": CALLS_MAX}
    with process("checkpoint", folder, **settings) as running:
        yield running


def address_of(process: Process) -> str:
    return f"127.0.0.1:{process.port}"


@contextlib.contextmanager
def connect_training(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield TrainingServiceStub(channel)


def until(condition: Any, seconds: float = 60.0) -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def ended(peer: Peer, streams: Sequence[int], seconds: float = 30.0) -> dict[int, bytes]:
    """Trailers of streams as they end; those that did not end in time are not there."""
    trailers: dict[int, bytes] = {}
    end_s = time.monotonic() + seconds
    for kind, flags, stream, payload in peer.frames(seconds):
        if kind == HEADERS and flags & END_STREAM:
            trailers[stream] = payload
        if set(streams) <= set(trailers) or time.monotonic() > end_s:
            break
    return trailers


def call_from(address: str, source: str, *, timeout_s: float = 10.0) -> float:
    """Seconds until a small call from a host is answered."""
    begun_s = time.monotonic()
    with Peer(address, source=source) as peer:
        stream = peer.open(f"/{SERVICE}/ListCheckpoints", message(LIST), end=True)
        trailers = ended(peer, [stream], timeout_s)
    assert stream in trailers, "no answer"
    assert b"SERVER_BUSY" not in trailers[stream], trailers
    assert b"share of the server" not in trailers[stream], trailers
    return time.monotonic() - begun_s


def silent(address: str, count: int, stack: ExitStack, per_connection: int = 250) -> list[Peer]:
    """So many calls that never send anything, on as few connections as that takes."""
    peers = []
    for start in range(0, count, per_connection):
        peer = stack.enter_context(Peer(address))
        for _ in range(min(per_connection, count - start)):
            peer.open(f"/{SERVICE}/WriteCheckpoint")
        peers.append(peer)
    return peers


def refusal_of(stub: Any) -> Any:
    """How a small call is refused; None where it is answered."""
    try:
        stub.ListCheckpoints(pb.ListCheckpointsRequest())
    except grpc.RpcError as error:
        return error
    return None


# --- places -----------------------------------------------------------------------------------


def test_health_is_outside_the_cap_and_no_peer_takes_all_places(server: Process) -> None:
    """1,100 silent streams: health answers, another host is served, the host itself hears which
    limit it is at and when to come again; and once they have stalled all is as before."""
    address = address_of(server)
    with watching([target_of("checkpoint", server)]), ExitStack() as stack:
        stub = CheckpointServiceStub(stack.enter_context(grpc.insecure_channel(address)))
        refused = None
        while refused is None:  # on a busy machine some have stalled when the last are opened
            peers = silent(address, amount(1100), stack)
            time.sleep(0.3)
            call_from(address, OTHER_HOST)
            refused = refusal_of(stub)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = {d.TypeName(): d for d in rpc_status.from_call(refused).details}
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        assert details["google.rpc.ErrorInfo"].Unpack(info)
        assert details["google.rpc.RetryInfo"].Unpack(retry)
        assert (info.reason, info.metadata["limit"]) == ("SERVER_BUSY", "peer_share_max")
        assert retry.retry_delay.ToMilliseconds() > 0
        until(lambda: STALLED in b"".join(ended(peers[0], [1]).values()))
        time.sleep(STALL_S)
        call_from(address, "127.0.0.1")


# --- stalls -----------------------------------------------------------------------------------


def methods_of(service: str) -> list[str]:
    found: Any = descriptor_pool.Default().FindServiceByName(service)
    return [f"/{service}/{name}" for name in found.methods_by_name]


@pytest.fixture(scope="module")
def every_server(
    server: Process, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Process]]:
    """One of each, by the name of its service."""
    folder = tmp_path_factory.mktemp("every")
    settings = {"base_model": tiny_model, "threads": 1, "running_max": 4}
    with (
        process("sampler", folder, **settings) as sampler,
        process("training", folder, data_folder=folder / "data") as training,
    ):
        yield {
            SERVICE: server,
            "tinsmith.v1.SamplerService": sampler,
            "tinsmith.v1.TrainingService": training,
        }


def test_every_stream_has_a_stall_timeout_for_what_is_sent(
    every_server: dict[str, Process],
) -> None:
    """Each method of each service, the unary ones and reflection too, with nothing sent and with
    half a message sent: all end by themselves, and say why."""
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    assert reflection_pb2_grpc
    targets = [target_of(name, running) for name, running in every_server.items()]
    with watching(targets), ExitStack() as stack:
        opened = []
        for service, running in every_server.items():
            peer = stack.enter_context(Peer(address_of(running)))
            for method in [*methods_of(service), reflection]:
                for body in (b"", message(b"x" * 100)[:50]):
                    opened.append((peer, peer.open(method, body), method))
        for peer in {id(peer): peer for peer, _, _ in opened}.values():
            streams = {stream: method for p, stream, method in opened if p is peer}
            trailers = ended(peer, list(streams))
            for stream, method in streams.items():
                assert stream in trailers, f"{method} did not end"
            # Header compression hides a text that was sent before; the first one is whole.
            assert STALLED in b"".join(trailers.values())


def test_a_write_that_stalls_leaves_nothing_behind(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What was staged is gone, and it counted against a budget while it was there."""
    folder = tmp_path_factory.mktemp("staged")
    limits = {"checkpoint_bytes_max": 4 * MIB, "staged_bytes_max": 8 * MIB}
    piece = checkpoints.piece("adapter_model.safetensors", 0, b"x" * (3 * MIB))
    begin = next(iter(checkpoints.messages(checkpoints.PATH, {}))).SerializeToString()
    body = message(begin) + message(piece.SerializeToString())
    with process("checkpoint", folder, data_folder=folder / "data", **limits) as running:
        staging = folder / "data" / "staging"
        with watching([target_of("checkpoint", running)]), Peer(address_of(running)) as peer:
            first = peer.open(f"/{SERVICE}/WriteCheckpoint")
            peer.push(first, len(body), content=body)
            # All of it counts by then, and not what comes next in its place.
            until(lambda: sum(path.stat().st_size for path in staging.rglob("*")) >= 3 * MIB)
            with Peer(address_of(running)) as other:
                second = other.open(f"/{SERVICE}/WriteCheckpoint")
                other.push(second, len(body), content=body)
                refusal = ended(other, [second])[second]
            assert b"staged_bytes_max" in refusal
            assert STALLED in ended(peer, [first])[first]
            until(lambda: not list(staging.iterdir()))


def test_a_reader_that_never_reads_holds_no_file(server: Process) -> None:
    """Reads and exports whose reader has no room, from its first byte on or after 64 KiB: they end,
    and their files are closed; a reader that goes on in time gets everything."""
    content = checkpoints.files(columns=100_000)
    asked = pb.ReadCheckpointRequest(checkpoint_path=checkpoints.PATH)
    export = pb.ExportCheckpointRequest(checkpoint_path=checkpoints.PATH)
    calls = [("ReadCheckpoint", asked), ("ExportCheckpoint", export)]
    files = Path(f"/proc/{server.pid}/fd")
    with grpc.insecure_channel(address_of(server)) as channel:
        stub = CheckpointServiceStub(channel)
        stub.WriteCheckpoint(checkpoints.messages(checkpoints.PATH, content, piece_bytes=MIB))
        before = len(list(files.iterdir()))
        with watching([target_of("checkpoint", server)]), ExitStack() as stack:
            for window in (0, 65_535):
                peer = stack.enter_context(Peer(address_of(server), window=window))
                for _ in range(amount(10, 100)):
                    for method, request in calls:
                        body = message(request.SerializeToString())
                        peer.open(f"/{SERVICE}/{method}", body, end=True)
            until(lambda: len(list(files.iterdir())) > before + 10)
            slow: dict[str, bytes] = {}
            for response in stub.ReadCheckpoint(asked):
                time.sleep(STALL_S / 20)
                piece = response.piece
                slow[piece.file_name] = slow.get(piece.file_name, b"") + piece.data
            assert {name: data for name, data in slow.items() if name} == content
            until(lambda: len(list(files.iterdir())) <= before + 4)


# --- half calls -------------------------------------------------------------------------------


def large_message(model_id: str, count: int, targets: int = 14) -> Any:
    """The first or a later message of a call: `count` data of some 90 kB."""
    tokens = np.arange(512) % 250
    data = pb_all.Datum(
        model_input=pb_all.ModelInput(
            chunks=[pb_all.ModelInputChunk(tokens=tensors.encode(tokens))]
        ),
        loss_fn_inputs={
            "target_tokens": tensors.encode(np.tile(tokens[:, None], (1, targets))),
            "weights": tensors.encode(np.ones((512, targets), np.float32)),
        },
    )
    header = {"model_id": model_id, "seq_id": 1, "loss_fn": CROSS_ENTROPY} if model_id else {}
    return pb_all.ForwardBackwardRequest(data=[data] * count, **header)


@pytest.mark.timeout(600)  # in full, 50 rounds of some 4 s
def test_received_bytes_count_against_a_budget_before_they_are_kept(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Calls of 56 MiB that are never complete, five at a time, for which servers took 700 MB: the
    budget says who may go on, small calls are served, and what stalled was never there."""
    folder = tmp_path_factory.mktemp("half")
    budget = {"call_bytes_max": 64 * MIB, "received_bytes_max": 64 * MIB, "peer_share_max": 1}
    training = Training(tiny_model, folder, stream_stall_s=STALL_S, **budget)
    refusals: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(training.server)
        stack.enter_context(training.start_rank())
        until_health(training.address, serving=True)
        stubs = stack.enter_context(connect_training(training.address))
        lora = pb_all.CreateModelRequest(lora_config=pb_all.LoraConfig(rank=2, seed=1))
        model_id = stubs.CreateModel(lora).model.model_id
        first, more = large_message(model_id, 48), large_message("", 48)

        def half_call() -> None:
            release = threading.Event()

            def messages() -> Iterator[Any]:
                yield first
                for _ in range(12):
                    yield more
                release.wait(60)

            try:
                list(stubs.ForwardBackward(messages(), timeout=60))
            except grpc.RpcError as error:
                watch.answered(error.code())
                refusals[reason_and_field(error)[0]] += 1
            finally:
                release.set()

        with watching([target_of("training", training.server)]) as watch:
            for _ in range(amount(2, 50)):
                callers = [threading.Thread(target=half_call) for _ in range(5)]
                for caller in callers:
                    caller.start()
                time.sleep(1)
                stubs.GetModel(pb_all.GetModelRequest(model_id=model_id), timeout=30)
                for caller in callers:
                    caller.join()
        assert refusals["SERVER_BUSY"], refusals
        assert set(refusals) <= {"SERVER_BUSY", "STREAM_STALLED"}, refusals
        step = pb_all.OptimStepRequest(model_id=model_id, seq_id=1)
        assert stubs.OptimStep(step, timeout=30).metrics


def test_half_messages_are_bounded_together(tmp_path_factory: pytest.TempPathFactory) -> None:
    """16 messages of 60 MiB whose last byte never comes, of unary calls too: 1 GB that grpc's core
    would hold and nobody has counted. Their callers are told to come again."""
    folder = tmp_path_factory.mktemp("half-messages")
    settings = {"data_folder": folder / "data", "received_bytes_max": 32 * MIB, "peer_share_max": 1}
    settings["message_bytes_max"] = 32 * MIB  # twice that much is received
    nbytes, before = 60 * MIB, b"\0" + struct.pack("!I", 60 * MIB)
    with process("checkpoint", folder, **settings) as running, ExitStack() as stack:
        with watching([target_of("checkpoint", running)]):
            peers = [stack.enter_context(Peer(address_of(running))) for _ in range(amount(16, 100))]
            pushing = []
            for index, peer in enumerate(peers):
                method = ("WriteCheckpoint", "GetCheckpoint")[index % 2]
                stream = peer.open(f"/{SERVICE}/{method}", before)
                work = threading.Thread(target=peer.push, args=(stream, nbytes - 1, STALL_S))
                pushing.append(work)
            for work in pushing:
                work.start()
            for work in pushing:
                work.join()
            assert call_from(address_of(running), "127.0.0.1") < 10
        assert running.says("SERVER_BUSY: half messages hold received_bytes_max")


# --- slots ------------------------------------------------------------------------------------


def test_a_compute_slot_is_never_held_while_waiting_for_a_reader(
    every_server: dict[str, Process],
) -> None:
    """Readers that never read, many times as many as there are slots, each with an answer that no
    window holds: everybody else is served meanwhile, long before they have stalled."""
    sampler = every_server["tinsmith.v1.SamplerService"]
    prompt = pb_all.ModelInput(chunks=[pb_all.ModelInputChunk(tokens=tensors.encode(np.arange(8)))])

    def request(max_tokens: int, count: int) -> Any:
        params = pb_all.SamplingParams(max_tokens=max_tokens, seed=1)
        params.stop.CopyFrom(pb_all.StopCondition())
        return pb_all.SampleRequest(prompt=prompt, sampling_params=params, num_samples=count)

    with watching([target_of("sampler", sampler)]), ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(address_of(sampler)))
        stub = SamplerServiceStub(channel)
        until_health(address_of(sampler), serving=True, service="tinsmith.v1.SamplerService")
        peer = stack.enter_context(Peer(address_of(sampler), window=0))
        body = message(request(64, 8).SerializeToString())
        for _ in range(amount(12, 100)):
            peer.open("/tinsmith.v1.SamplerService/Sample", body, end=True)
        begun_s = time.monotonic()
        served = 0
        while time.monotonic() - begun_s < STALL_S / 2 or not served:
            list(stub.Sample(request(2, 1), timeout=60))
            served += 1
        assert served

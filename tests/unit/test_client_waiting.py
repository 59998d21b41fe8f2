"""The client waits out what dies, says so in one line, and gives up only when nothing answers."""

import io
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import tinsmith
from faults.peer import (
    Fault,
    Peer,
    after,
    busy,
    full,
    refuse,
    storage_full,
    too_large,
    unavailable,
)
from tinsmith import _lane, _loop, _retry, _waiting
from tinsmith.v1 import training_service_pb2 as pb

ADAM = tinsmith.AdamParams()
PROMPT = tinsmith.ModelInput.from_ints([1])


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Peer]]:
    """Servers that are stopped at the end; the client waits and speaks in a hurry."""
    for name, value in {"DELAY_S_FIRST": 0.01, "DELAY_S_MAX": 0.05}.items():
        monkeypatch.setattr(_retry, name, value)
    times = {"TICK_S": 0.02, "FIRST_LINE_S": 0.1, "LINE_INTERVAL_S": 0.25, "SLOW_S": 0.2}
    for name, value in {**times, "ASK_INTERVAL_S": 0.05, "TAKEN_S": 0.3}.items():
        monkeypatch.setattr(_waiting, name, value)
    running: list[Peer] = []
    yield running
    for peer in running:
        peer.stop()


@pytest.fixture
def peer(peers: list[Peer]) -> Peer:
    """A server without faults yet."""
    peers.append(Peer())
    return peers[0]


def client_of(peer: Peer, give_up_after_s: float = 20.0) -> tinsmith.TrainingClient:
    service = tinsmith.ServiceClient(base_url=peer.address, give_up_after_s=give_up_after_s)
    return service.create_lora_training_client("base").result(10)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tinsmith"]


def until_said(caplog: pytest.LogCaptureFixture, text: str) -> str:
    """Wait for a line with a text; returns it."""
    give_up_s = time.monotonic() + 60
    while time.monotonic() < give_up_s:
        for line in lines_of(caplog):
            if text in line:
                return line
        time.sleep(0.01)
    raise AssertionError(f"no line has {text!r}: {lines_of(caplog)}")


# --- what a person reads --------------------------------------------------------------------------


def test_however_many_calls_wait_there_is_one_line(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts them, says for how long and why, comes at intervals, and says when it goes on."""
    trainer = client_of(peer)
    peer.go_away()
    futures = [trainer.optim_step(ADAM) for _ in range(20)]
    began_s = time.monotonic()
    line = until_said(caplog, "waiting for the service (20 calls")
    assert "optim_step: " in line
    assert "connect" in line.lower()
    time.sleep(1)
    peer.start()
    for future in futures:
        future.result(10)
    until_said(caplog, "going on after ")
    lasted_s = time.monotonic() - began_s
    lines = lines_of(caplog)
    assert len(lines) <= 3 + lasted_s / _waiting.LINE_INTERVAL_S
    assert [line for line in lines if "going on" in line] == lines[-1:]


def test_a_short_blip_is_not_worth_a_line(
    peer: Peer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is retried and nobody is told."""
    monkeypatch.setattr(_waiting, "FIRST_LINE_S", 600.0)
    trainer = client_of(peer)
    peer.servicer.before[1] = [unavailable]
    trainer.optim_step(ADAM).result(10)
    time.sleep(0.2)
    assert lines_of(caplog) == []


def test_a_model_that_is_brought_back_is_said(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    """A call without an answer and without an error may wait for that; the model is asked."""
    trainer = client_of(peer)
    held = first_call_held(peer)
    peer.servicer.model = pb.Model(
        model_id="m", state=pb.MODEL_STATE_RECOVERING, state_message="replaying call 7 of 12"
    )
    futures = [trainer.optim_step(ADAM) for _ in range(3)]
    line = until_said(caplog, "waiting for the service (3 calls")
    assert "replaying call 7 of 12" in line
    held.set()
    for future in futures:
        future.result(10)
    until_said(caplog, "going on after ")


def test_a_call_that_only_takes_long_is_no_line(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is READY: the ranks are computing."""
    trainer = client_of(peer)
    trainer_waits = after(0.6, _nothing)
    peer.servicer.before[1] = [trainer_waits]
    trainer.optim_step(ADAM).result(10)
    assert lines_of(caplog) == []


async def _nothing(context: Any) -> None:
    return None


# --- what is waited for, and for how long ---------------------------------------------------------


def torn(context: Any) -> Any:
    """What grpc.aio says when the connection breaks while a message is sent."""
    return context.abort(grpc.StatusCode.INTERNAL, "Internal error from Core")


def proxy_timeout(context: Any) -> Any:
    """What a proxy says that waited for too long."""
    return context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "upstream request timeout")


@pytest.mark.parametrize("fault", [storage_full, busy, torn, proxy_timeout])
def test_what_says_later_is_sent_again(peer: Peer, fault: Fault) -> None:
    """A full disk with a delay, grpc's own limit on calls, and connections that broke."""
    trainer = client_of(peer)
    peer.servicer.before[1] = [fault, fault]
    trainer.optim_step(ADAM).result(10)
    assert peer.servicer.applied == [(1, "optim_step")]


def test_a_full_disk_without_a_delay_is_final(peer: Peer) -> None:
    """Nobody says that room may come back."""
    trainer = client_of(peer)

    def for_good(context: Any) -> Any:
        return refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")

    peer.servicer.before[1] = [for_good]
    with pytest.raises(tinsmith.ResourceExhaustedError, match="STORAGE_FULL"):
        trainer.optim_step(ADAM).result(10)


def test_a_call_that_waited_long_for_its_turn_is_not_given_up_at_its_first_failure(
    peer: Peer,
) -> None:
    """The clock runs from the first failure, not from the call."""
    trainer = client_of(peer, give_up_after_s=0.5)
    peer.servicer.before[1] = [after(1.0, unavailable)]
    trainer.optim_step(ADAM).result(10)
    assert peer.servicer.arrived == [1, 1]


def test_a_busy_service_is_never_given_up(peer: Peer) -> None:
    """It answers: the lane is full, come again."""
    trainer = client_of(peer, give_up_after_s=0.2)
    peer.servicer.before[1] = [full] * 30
    trainer.optim_step(ADAM).result(10)
    assert len(peer.servicer.arrived) == 31


def test_answers_to_other_calls_keep_hope_alive(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same service: as long as it answers somebody, the failing call is not given up."""
    peer.servicer.sample_breaks = 0
    service = tinsmith.ServiceClient(base_url=peer.address, give_up_after_s=60)
    sampler = service.create_sampling_client(base_model="base").result()
    peer.servicer.sample_breaks = 10**6
    failing = sampler.sample(PROMPT)
    loop = _loop.loop()
    time_s, ahead_s = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: time_s() + ahead_s)
    for _ in range(10):
        attempts = len(peer.servicer.sample_seeds)
        ahead_s += 40  # less than the client gives up after, and all together more
        while len(peer.servicer.sample_seeds) < attempts + 3 and not failing.future().done():
            time.sleep(0.01)
        sampler.compute_logprobs(PROMPT).result(10)
    assert not failing.future().done()
    ahead_s += 100
    with pytest.raises(tinsmith.UnavailableError):
        failing.result(60)


def first_call_held(peer: Peer) -> threading.Event:
    """The peer answers call 1 once the event is set."""
    held = threading.Event()

    async def hold(context: Any) -> None:
        await peer.loop.run_in_executor(None, held.wait, 60)

    peer.servicer.before[1] = [hold]
    return held


# --- restarts -------------------------------------------------------------------------------------


def test_a_server_that_goes_away_with_100_waiting_calls_answers_all_of_them(peer: Peer) -> None:
    """They are sent again, by whatever path they come, and each counts once (row 6)."""
    held = first_call_held(peer)
    trainer = client_of(peer)
    futures = [trainer.optim_step(ADAM) for _ in range(100)]
    while len(peer.servicer.arrived) < 100:
        time.sleep(0.01)
    peer.go_away()
    held.set()
    peer.start()
    for future in futures:
        future.result(10)
    assert [seq_id for seq_id, _ in peer.servicer.applied] == list(range(1, 101))


def test_creating_waits_for_a_service_that_is_not_there_yet(peer: Peer) -> None:
    """A script may be started before the cluster."""
    peer.go_away()
    future = tinsmith.ServiceClient(base_url=peer.address).create_lora_training_client("base")
    time.sleep(0.2)
    peer.start()
    assert future.result(10).model_id == "m"


def test_a_cluster_that_is_still_loading_is_waited_for(peer: Peer) -> None:
    """Its answer has no base model yet; a script that takes the first one must not fail."""
    service = tinsmith.ServiceClient(base_url=peer.address)
    future = service.create_rest_client().get_server_capabilities()
    time.sleep(0.2)
    assert not future.future().done()
    peer.servicer.capabilities.base_models.add(name="base", context_length=8)
    assert [m.model_name for m in future.result(10).supported_models] == ["base"]


def test_a_sampler_that_came_back_elsewhere_is_found(peer: Peer, peers: list[Peer]) -> None:
    """Its address is asked for again when the old one does not answer."""
    old, new = Peer(), Peer()
    peers += [old, new]
    new.servicer.sample_breaks = 0
    peer.servicer.capabilities.sampler_address = f":{old.port}"
    sampler = tinsmith.ServiceClient(base_url=peer.address).create_sampling_client(
        base_model="base"
    )
    assert sampler.sample(PROMPT).result(10).sequences[0].tokens == [1, 2, 3, 4, 5]
    old.go_away()
    peer.servicer.capabilities.sampler_address = f":{new.port}"
    assert sampler.sample(PROMPT).result(10).sequences[0].tokens == [1, 2, 3, 4, 5]
    old.start()


def test_sampling_goes_on_without_the_training_server(peer: Peer, peers: list[Peer]) -> None:
    """A Sampler that restarts while Training is away is found where it was."""
    other = Peer()
    peers.append(other)
    peer.servicer.capabilities.sampler_address = f":{other.port}"
    sampler = tinsmith.ServiceClient(base_url=peer.address).create_sampling_client(
        base_model="base"
    )
    sampler.sample(PROMPT).result(10)
    peer.go_away()
    other.go_away()
    future = sampler.sample(PROMPT)
    time.sleep(0.2)
    other.start()
    assert future.result(10).sequences[0].tokens == [1, 2, 3, 4, 5]
    peer.start()


def test_a_stream_that_is_begun_again_with_other_tokens_is_no_sample(peer: Peer) -> None:
    """Two halves of different samples must not look like one."""
    peer.servicer.sample_cuts = [[1, 9], [3, 4], [5]]
    sampler = tinsmith.ServiceClient(base_url=peer.address).create_sampling_client(
        base_model="base"
    )
    stream = sampler.sample_stream(PROMPT)
    assert next(stream).tokens == [1, 2, 3]
    with pytest.raises(tinsmith.DataLossError) as failure:
        list(stream)
    assert failure.value.reason == "SAMPLE_DIFFERS"


def test_a_download_that_breaks_goes_on(peer: Peer, tmp_path: Path) -> None:
    """What came before is there once."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("adapter_model.safetensors")
        member.size = 5000
        tar.addfile(member, io.BytesIO(b"x" * 5000))
    whole = archive.getvalue()
    peer.servicer.pieces = [whole[:1000], unavailable, whole[1000:]]
    rest = tinsmith.ServiceClient(base_url=peer.address).create_rest_client()
    folder = rest.download_checkpoint("tinsmith://m/weights/a", tmp_path / "a").result(10)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"x" * 5000


def test_deleting_twice_because_an_answer_was_lost_is_no_error(peer: Peer) -> None:
    """What a caller asked for has happened; what was never there is still not found."""
    path = "tinsmith://m/weights/a"
    rest = tinsmith.ServiceClient(base_url=peer.address).create_rest_client()
    peer.servicer.checkpoints = {path}
    peer.servicer.delete_faults = [unavailable]
    rest.delete_checkpoint_from_tinker_path(path).result(10)
    assert peer.servicer.checkpoints == set()
    with pytest.raises(tinsmith.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result(10)


# --- the window -----------------------------------------------------------------------------------


def test_a_thousand_calls_do_not_all_wait_in_the_service(peer: Peer) -> None:
    """A window of them is under way; the rest follows, in order."""
    held = first_call_held(peer)
    trainer = client_of(peer)
    futures = [trainer.optim_step(ADAM) for _ in range(1000)]
    while len(peer.servicer.arrived) < _lane.WINDOW:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(peer.servicer.arrived) == list(range(1, _lane.WINDOW + 1))
    held.set()
    for future in futures:
        future.result(20)
    assert [seq_id for seq_id, _ in peer.servicer.applied] == list(range(1, 1001))


def test_a_custom_loss_in_front_of_a_full_window_goes_on(peer: Peer) -> None:
    """Its second call is inside of the window that its first one opened."""
    pytest.importorskip("torch")
    trainer = client_of(peer)
    tokens = np.arange(3)
    datum = tinsmith.Datum(tinsmith.ModelInput.from_ints([0, 1, 2]), {"target_tokens": tokens})

    def loss(data: Any, logprobs: Any) -> Any:
        return -logprobs[0].sum(), {}

    custom = trainer.forward_backward_custom([datum], loss)
    futures = [trainer.optim_step(ADAM) for _ in range(2 * _lane.WINDOW)]
    custom.result(10)
    for future in futures:
        future.result(10)
    assert [seq_id for seq_id, _ in peer.servicer.applied] == list(range(1, 2 * _lane.WINDOW + 3))


def test_a_refused_call_does_not_hold_the_window(peer: Peer) -> None:
    """Its number is used up like any other."""
    trainer = client_of(peer)
    peer.servicer.before[1] = [too_large]
    refused = trainer.optim_step(ADAM)
    futures = [trainer.optim_step(ADAM) for _ in range(_lane.WINDOW + 5)]
    with pytest.raises(tinsmith.ResourceExhaustedError):
        refused.result(10)
    for future in futures:
        future.result(10)

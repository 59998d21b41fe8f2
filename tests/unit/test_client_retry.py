"""Numbers, repeats and faults, against a small real server that fails as it is told to."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import tinsmith
from faults.peer import Fault, Peer, full, gap, refuse, too_large, unavailable
from tinsmith import _loop, _retry, keys


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """A server without faults yet; the client waits only briefly between attempts."""
    monkeypatch.setattr(_retry, "DELAY_S_FIRST", 0.01)
    monkeypatch.setattr(_retry, "DELAY_S_MAX", 0.05)
    running = Peer()
    yield running
    running.stop()


@pytest.fixture
def trainer(peer: Peer) -> tinsmith.TrainingClient:
    """A client of the peer."""
    service = tinsmith.ServiceClient(base_url=peer.address, give_up_after_s=20.0)
    return service.create_lora_training_client("base").result(10)


def data(length: int = 3) -> list[tinsmith.Datum]:
    tokens = np.arange(length)
    inputs = {"target_tokens": tokens, "weights": np.ones(length, np.float32)}
    return [tinsmith.Datum(tinsmith.ModelInput.from_ints(tokens.tolist()), inputs)]


ADAM = tinsmith.AdamParams()


def test_calls_are_sent_without_waiting_and_count_in_order(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """All are under way at once; their numbers are the program's order."""
    futures: list[Any] = []
    for _ in range(3):
        futures.append(trainer.forward_backward(data(), "cross_entropy"))
        futures.append(trainer.optim_step(ADAM))
    for future in futures:
        future.result(10)
    steps = ["forward_backward", "optim_step"] * 3
    assert peer.servicer.applied == list(enumerate(steps, start=1))


@pytest.mark.parametrize("fault", [unavailable, full, gap])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_is_waited_out_under_the_same_number(
    peer: Peer, trainer: tinsmith.TrainingClient, fault: Fault, when: str
) -> None:
    """Whether the answer or the call was lost: it is sent again and has its effect once."""
    getattr(peer.servicer, when)[1] = [fault, fault]
    first = trainer.forward_backward(data(), "cross_entropy")
    second = trainer.optim_step(ADAM)
    assert first.result(10).metrics == {"loss:sum": 1.0}
    second.result(10)
    assert peer.servicer.arrived.count(1) == 3
    assert peer.servicer.applied == [(1, "forward_backward"), (2, "optim_step")]


def test_creating_again_carries_the_same_request_id(peer: Peer) -> None:
    """Else a lost answer would leave a second model."""
    peer.servicer.create_faults = [unavailable]
    tinsmith.ServiceClient(base_url=peer.address).create_lora_training_client("base").result(10)
    assert len(peer.servicer.created) == 2
    assert len(set(peer.servicer.created)) == 1
    assert peer.servicer.created[0]


def test_a_refusal_without_a_delay_is_final_and_leaves_no_hole(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """The server did not use the number; the client does, so that the next call can run."""
    peer.servicer.before[1] = [too_large]
    bad = trainer.forward_backward(data(), "cross_entropy")
    good = trainer.optim_step(ADAM)
    with pytest.raises(tinsmith.ResourceExhaustedError):
        bad.result(10)
    good.result(10)
    assert peer.servicer.applied == [(2, "optim_step")]


def test_a_call_whose_key_was_replaced_meanwhile_is_made_again(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its number, with the new one; where the file has no other, the refusal is final."""
    monkeypatch.setattr(keys, "LOOK_INTERVAL_S", 0.0)
    file = tmp_path / "token"
    file.write_text("one\n")
    monkeypatch.setenv("TINSMITH_API_KEY_FILE", str(file))
    shown: list[str] = []

    async def ended(context: Any) -> None:
        shown.append(dict(context.invocation_metadata())["authorization"])
        if len(shown) < 2:
            file.write_text("another\n")
        if len(shown) != 2:
            await refuse(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")

    peer.servicer.before[1] = [ended, ended]
    peer.servicer.before[2] = [ended]
    service = tinsmith.ServiceClient(base_url=peer.address, give_up_after_s=20.0)
    trainer = service.create_lora_training_client("base").result(10)
    assert trainer.forward_backward(data(), "cross_entropy").result(10).metrics
    assert shown == ["Bearer one", "Bearer another"]
    with pytest.raises(tinsmith.AuthenticationError):
        trainer.optim_step(ADAM).result(10)
    assert peer.servicer.applied == [(1, "forward_backward")]


def test_a_file_of_a_key_that_cannot_be_used_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a call is made; one that is away later changes nothing."""
    monkeypatch.setattr(keys, "LOOK_INTERVAL_S", 0.0)
    file = tmp_path / "token"
    monkeypatch.setenv("TINSMITH_API_KEY_FILE", str(file))
    for content, message in ((None, "cannot read"), ("", "is empty"), ("a b", "visible ASCII")):
        if content is not None:
            file.write_text(content)
        with pytest.raises(tinsmith.InvalidArgumentError, match=message) as refused:
            tinsmith.ServiceClient(base_url="localhost:1")
        assert refused.value.field == "TINSMITH_API_KEY_FILE"
    file.write_text("good")
    read = keys.KeyFile(str(file))
    file.write_text("")
    assert read.current().metadata() == (("authorization", "Bearer good"),)
    file.unlink()
    assert read.current().metadata() == (("authorization", "Bearer good"),)
    file.write_text("better")
    assert read.current().metadata() == (("authorization", "Bearer better"),)


def test_an_invalid_call_uses_its_number_up(peer: Peer, trainer: tinsmith.TrainingClient) -> None:
    """The client goes on with the next one."""
    bad = [tinsmith.Datum(tinsmith.ModelInput.from_ints([1]), {})]
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        trainer.forward_backward(bad, "cross_entropy").result(10)
    assert refusal.value.reason == "MISSING_FIELD"
    trainer.optim_step(ADAM).result(10)
    assert peer.servicer.applied == [(2, "optim_step")]


def test_what_the_client_refuses_takes_no_number(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """The first call that is sent is number 1."""
    with pytest.raises(tinsmith.InvalidArgumentError):
        trainer.forward_backward([], "cross_entropy")
    with pytest.raises(tinsmith.InvalidArgumentError):
        trainer.forward_backward(data(), "no such loss")  # type: ignore[arg-type]
    trainer.optim_step(ADAM).result(10)
    assert peer.servicer.applied == [(1, "optim_step")]


def test_a_cancelled_future_leaves_no_hole(peer: Peer, trainer: tinsmith.TrainingClient) -> None:
    """Nobody waits for its answer any more; it still takes effect in its place."""
    trainer.forward_backward(data(), "cross_entropy").future().cancel()
    trainer.optim_step(ADAM).result(10)
    assert peer.servicer.applied == [(1, "forward_backward"), (2, "optim_step")]


def test_futures_cancelled_before_anything_was_sent_leave_no_hole(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """Cancelled by the thread that made them, at once: every number is used all the same."""
    blocked = threading.Event()
    _loop.loop().call_soon_threadsafe(blocked.wait, 60)  # the loop cannot begin any of them
    futures = [trainer.optim_step(tinsmith.AdamParams()) for _ in range(20)]
    assert all(future.future().cancel() for future in futures)
    blocked.set()
    trainer.optim_step(tinsmith.AdamParams()).result(10)
    assert [number for number, _ in peer.servicer.applied] == list(range(1, 22))


def test_large_data_travel_in_several_messages(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """No message is much larger than 4 MiB."""
    result = trainer.forward_backward(data(100_000) * 5, "cross_entropy").result(20)
    assert len(result.loss_fn_outputs) == 5
    sizes = peer.servicer.messages[1]
    assert len(sizes) > 1
    assert max(sizes) < 4.2 * 1024 * 1024


def test_many_threads_share_one_client(peer: Peer, trainer: tinsmith.TrainingClient) -> None:
    """Every number is used once and none is missing."""
    threads = [
        threading.Thread(
            target=lambda: [trainer.optim_step(ADAM).result(20) for _ in range(10)], daemon=True
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [seq_id for seq_id, _ in peer.servicer.applied] == list(range(1, 41))


def test_a_failing_custom_loss_changes_nothing_and_the_client_goes_on(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """Its own error comes out of the future; the call behind it is not held up."""
    pytest.importorskip("torch")

    def broken(data: Any, logprobs: Any) -> Any:
        raise ZeroDivisionError("mine")

    failed = trainer.forward_backward_custom(data(), broken)
    behind = trainer.optim_step(ADAM)
    with pytest.raises(ZeroDivisionError, match="mine"):
        failed.result(10)
    behind.result(10)
    assert peer.servicer.applied == [(1, "forward"), (3, "optim_step")]


def test_giving_up_is_said_and_later_calls_do_not_overtake(peer: Peer) -> None:
    """After `give_up_after_s` the error comes out, and nothing runs out of order."""
    service = tinsmith.ServiceClient(base_url=peer.address, give_up_after_s=0.2)
    trainer = service.create_lora_training_client("base").result(10)
    peer.servicer.before[1] = [unavailable] * 1000
    with pytest.raises(tinsmith.UnavailableError):
        trainer.optim_step(ADAM).result(20)
    with pytest.raises(tinsmith.FailedPreconditionError) as refusal:
        trainer.optim_step(ADAM).result(20)
    assert refusal.value.reason == "UNDELIVERED"
    assert peer.servicer.applied == []


def test_a_broken_sample_is_drawn_again_with_the_same_seed(peer: Peer) -> None:
    """The seed is the client's, so that both attempts make the same tokens."""
    sampler = tinsmith.ServiceClient(base_url=peer.address).create_sampling_client(
        base_model="base"
    )
    response = sampler.sample(tinsmith.ModelInput.from_ints([1])).result(10)
    assert response.sequences[0].tokens == [1, 2, 3, 4, 5]
    assert response.sequences[0].stop_reason == "stop"
    assert len(peer.servicer.sample_seeds) == 2
    assert len(set(peer.servicer.sample_seeds)) == 1


def test_a_broken_stream_of_samples_gives_each_token_once(peer: Peer) -> None:
    """Also where the second attempt cuts its messages elsewhere; the reason is not lost."""
    sampler = tinsmith.ServiceClient(base_url=peer.address).create_sampling_client(
        base_model="base"
    )
    parts = list(sampler.sample_stream(tinsmith.ModelInput.from_ints([1])))
    assert [token for part in parts for token in part.tokens] == [1, 2, 3, 4, 5]
    assert all(len(part.tokens) == len(part.logprobs) for part in parts)
    assert [part.stop_reason for part in parts if part.stop_reason] == ["stop"]

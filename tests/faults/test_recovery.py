"""What the Training server promises when ranks or its own process fail, one fault a test."""

import signal
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

import tinsmith
from clusters import until_health
from faults.processes import Training
from faults.recovering import STEPS, Seen, data, model_of, state, train, two_trained, values
from tinsmith import types
from tinsmith import v1 as pb
from tinsmithd.training.journal import sqlite_tables
from wire import reason_and_field

RECOVERY = "tinsmith.v1.TrainingService/recovery"


def snapshots(training: Training) -> Sequence[Path]:
    """Folders of finished snapshots, oldest first."""
    found = (training.data / "snapshots").glob("*/manifest.json")
    return sorted(path.parent for path in found if "staging" not in path.parts)


def damage(folder: Path) -> None:
    """Flip one bit in the middle of a snapshot's weights."""
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_row_1_ranks_killed_while_idle_come_back_with_the_same_bits(
    training: Training, undisturbed: Seen
) -> None:
    """I2, I3: the next call waits for the next group and goes on bit for bit; pending gradients,
    too; health says when recovery ended. A model that nobody calls stays on disk until then."""
    training.start_rank()
    service = tinsmith.ServiceClient(base_url=training.address)
    client, idle = model_of(service), model_of(service)
    seen = train(client, 0, STEPS)
    assert train(idle, 0, 1) == seen[:2]
    seen.append(values(client.forward_backward(data(STEPS), "cross_entropy").result(60)))
    training.ranks[0].kill()
    until_health(training.address, serving=False)
    training.start_rank()
    step = client.optim_step(types.AdamParams(learning_rate=1e-2))
    seen.append(values(step.result(60)))
    assert seen + train(client, STEPS + 1, 2 * STEPS) == undisturbed
    until_health(training.address, serving=True, service=RECOVERY)
    assert state(training, client.model_id).state == pb.ModelState.MODEL_STATE_READY
    assert state(training, idle.model_id).state == pb.ModelState.MODEL_STATE_SUSPENDED
    assert train(idle, 1, 2) == undisturbed[2:4]


def test_row_11_a_stopped_group_is_replaced_and_cannot_come_back(
    training: Training, undisturbed: Seen
) -> None:
    """SIGSTOP for longer than the lease, a group that stood by takes over, SIGCONT: what the old
    one still says has no effect, and it stands by itself; then it may take over, without anything
    stale."""
    first = training.start_rank()
    first.until(lambda: training.server.says("rank group attached"))
    second = training.start_rank()
    second.until(lambda: training.server.says("a rank group stands by"))
    client = model_of(tinsmith.ServiceClient(base_url=training.address))
    seen = train(client, 0, 2)
    futures = [client.forward_backward(data(2), "cross_entropy")]
    first.signal(signal.SIGSTOP)
    futures.append(client.optim_step(types.AdamParams(learning_rate=1e-2)))  # type: ignore[arg-type]
    seen += [values(future.result(60)) for future in futures]
    assert training.server.says("it has lost its place")
    seen += train(client, 3, 5)
    first.signal(signal.SIGCONT)
    training.server.until(
        lambda: training.server.log.read_text().count("a rank group stands by") >= 2
    )
    seen += train(client, 5, STEPS)
    second.kill()
    assert seen + train(client, STEPS, 2 * STEPS) == undisturbed


def test_row_11_a_training_server_that_was_replaced_writes_nothing(
    training: Training, undisturbed: Seen
) -> None:
    """Another server claims the journal; the first one is fenced, says so and ends; what was
    acknowledged is with the second."""
    training.start_rank()
    client = model_of(tinsmith.ServiceClient(base_url=training.address))
    seen = train(client, 0, STEPS)
    old = training.server
    training.server = training.start_server()
    training.start_rank()
    with grpc.insecure_channel(f"127.0.0.1:{old.port}") as channel:
        stub = pb.TrainingServiceStub(channel)
        request = pb.OptimStepRequest(model_id=client.model_id, seq_id=2 * STEPS + 1)
        with pytest.raises(grpc.RpcError) as refusal:
            stub.OptimStep(request, timeout=60)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    assert old.wait() != 0
    assert old.log.read_text().count("has taken") >= 1
    assert state(training, client.model_id).next_seq_id == 2 * STEPS + 1
    with grpc.insecure_channel(training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        with pytest.raises(grpc.RpcError) as conflict:  # other content than that of the last step
            stub.OptimStep(pb.OptimStepRequest(model_id=client.model_id, seq_id=2 * STEPS))
        assert conflict.value.code() is grpc.StatusCode.ALREADY_EXISTS
        new = pb.OptimStepRequest(model_id=client.model_id, seq_id=2 * STEPS + 1)
        assert stub.OptimStep(new, timeout=60).metrics["step:last"] == STEPS + 1
    assert seen == undisturbed[: 2 * STEPS]


def test_a_model_that_was_deleted_is_not_created_again_by_a_late_repeat(
    training: Training,
) -> None:
    """The repeat of its CreateModel comes after it was deleted and the server was killed: the
    answer is the first one, and there is no model."""
    training.start_rank()
    until_health(training.address, serving=True)
    request = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1), request_id="once")
    with grpc.insecure_channel(training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        first = stub.CreateModel(request, timeout=60).model
        stub.DeleteModel(pb.DeleteModelRequest(model_id=first.model_id), timeout=60)
    training.server.kill()
    training.server = training.start_server()
    training.start_rank()
    until_health(training.address, serving=True)
    with grpc.insecure_channel(training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        again = stub.CreateModel(request, timeout=60).model
        assert (again.model_id, again.create_time) == (first.model_id, first.create_time)
        assert not stub.ListModels(pb.ListModelsRequest()).models
        with pytest.raises(grpc.RpcError) as gone:
            stub.GetModel(pb.GetModelRequest(model_id=again.model_id))
        assert reason_and_field(gone.value)[0] == "MODEL_NOT_FOUND"
        request.lora_config.rank = 3
        with pytest.raises(grpc.RpcError) as other:
            stub.CreateModel(request)
        assert reason_and_field(other.value)[0] == "REQUEST_ID_CONFLICT"


def test_row_29_a_damaged_snapshot_costs_time_two_cost_the_model(
    training: Training, undisturbed: Seen
) -> None:
    """The older snapshot and the calls after it give the same bits; with both damaged that model is
    DATA_LOSS, and the one beside it goes on."""
    training.start_rank()
    service = tinsmith.ServiceClient(base_url=training.address)
    client, other = model_of(service), model_of(service)

    def of_client() -> list[Path]:
        name = client.model_id.replace(":", "_")  # as a folder's name has it
        return [path for path in snapshots(training) if name in path.name]

    # No snapshot begins while one is being written: await the first before the second is due.
    seen = train(client, 0, 4)
    training.server.until(lambda: len(of_client()) == 1)
    seen += train(client, 4, STEPS)
    training.server.until(lambda: len(of_client()) == 2)
    assert train(other, 0, STEPS) == seen
    newest = of_client()[-1]
    training.kill()
    damage(newest)
    training.restart_server()
    training.start_rank()
    assert seen + train(client, STEPS, STEPS + 1) == undisturbed[: 2 * STEPS + 2]
    assert training.server.says("adapter_model.safetensors is damaged")
    training.kill()
    for path in of_client():
        if path != newest:
            damage(path)
    training.restart_server()
    training.start_rank()
    with pytest.raises(tinsmith.DataLossError):
        train(client, STEPS + 1, STEPS + 2)
    assert state(training, client.model_id).state == pb.ModelState.MODEL_STATE_LOST
    assert seen + train(other, STEPS, 2 * STEPS) == undisturbed


def test_a_replay_that_gives_another_result_is_data_loss_of_that_model(
    training: Training, undisturbed: Seen
) -> None:
    """Never a silently different model: the recorded digest decides; other models are untouched."""
    training.start_rank()
    client, other, seen = two_trained(training, 2)
    training.kill()
    with sqlite3.connect(training.data / "journal.sqlite") as journal:
        # Sealed again: the row is whole, and what it says is not what the replay will give.
        journal.create_function("seal", -1, sqlite_tables.seal, deterministic=True)
        of_first = "WHERE model_id=? AND position=1"
        for change in ("answer_digest=zeroblob(32)", f"crc32={sqlite_tables.CALL_SEAL}"):
            journal.execute(f"UPDATE calls SET {change} {of_first}", (client.model_id,))
    training.restart_server()
    training.start_rank()
    with pytest.raises(tinsmith.DataLossError, match="gave another result"):
        train(client, 2, 3)
    assert seen + train(other, 2, 2 * STEPS) == undisturbed
    training.restart_server()  # it stays lost
    with pytest.raises(tinsmith.DataLossError):
        client.forward(data(0), "cross_entropy").result(60)


def test_row_39_other_ranks_than_those_that_computed_are_refused_and_nothing_is_lost(
    training: Training, undisturbed: Seen
) -> None:
    """Calls that must be made again wait for ranks that can give the same bits; the message says
    what differs."""
    training.start_rank()
    client = model_of(tinsmith.ServiceClient(base_url=training.address))
    seen = train(client, 0, 2)
    training.ranks[0].kill()
    wrong = training.start_rank(threads=2)
    waiting = client.forward_backward(data(2), "cross_entropy")
    wrong.until(lambda: training.server.says("threads was 1 and is 2"))
    with grpc.insecure_channel(training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refusal:
            stub.OptimStep(pb.OptimStepRequest(model_id=client.model_id), timeout=60)
    assert reason_and_field(refusal.value)[0] == "RANK_GROUP_MISMATCH"
    found = state(training, client.model_id)
    assert found.state == pb.ModelState.MODEL_STATE_RECOVERING
    assert "threads differs" in found.state_message
    assert "was 1" not in found.state_message  # how they differ is for the log
    wrong.kill()
    training.start_rank()
    seen.append(values(waiting.result(60)))
    step = client.optim_step(types.AdamParams(learning_rate=1e-2))
    seen.append(values(step.result(60)))
    assert seen + train(client, 3, 2 * STEPS) == undisturbed


def test_row_25_a_call_that_kills_the_ranks_twice_is_refused_and_consumed(
    training: Training, undisturbed: Seen
) -> None:
    """Not retried for ever, without effect, and the models beside it go on."""
    training.start_rank()
    service = tinsmith.ServiceClient(base_url=training.address)
    client, other = model_of(service), model_of(service)
    seen = train(client, 0, 2)
    training.ranks[0].kill()
    deadly = {"TINSMITH_FAILPOINTS": "mid_forward:abort"}
    training.start_rank(env=deadly)
    poison = client.forward(data(0), "cross_entropy")
    assert training.ranks[-1].wait() == -signal.SIGABRT
    training.start_rank(env=deadly)
    with pytest.raises(tinsmith.FailedPreconditionError) as refusal:
        poison.result(60)
    assert refusal.value.reason == "CALL_POISONED"
    training.ranks[-1].wait()
    training.start_rank()
    assert seen + train(client, 2, 2 * STEPS) == undisturbed
    assert train(other, 0, 2 * STEPS) == undisturbed


def test_row_24_a_gradient_that_is_not_finite_is_named_and_cleared(training: Training) -> None:
    """The refusal says which call brought it; weights are as before; a replay says the same."""
    training.start_rank()
    client = model_of(tinsmith.ServiceClient(base_url=training.address))
    train(client, 0, 1)
    before = values(client.forward(data(9), "cross_entropy").result(60))
    client.forward_backward(data(1), "cross_entropy")
    client.forward_backward(data(2, weight=3e38), "cross_entropy")  # seq_id 5
    client.forward_backward(data(3), "cross_entropy")
    with pytest.raises(tinsmith.FailedPreconditionError) as refusal:
        client.optim_step(types.AdamParams()).result(60)
    assert refusal.value.reason == "NON_FINITE_GRADIENT"
    assert "seq_id 5" in str(refusal.value)
    assert values(client.forward(data(9), "cross_entropy").result(60)) == before
    training.ranks[0].kill()
    training.start_rank()
    assert values(client.forward(data(9), "cross_entropy").result(90)) == before
    assert train(client, 1, 2)

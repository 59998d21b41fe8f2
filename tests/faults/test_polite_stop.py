"""SIGTERM to the Training server: who waits hears it at once, and nothing is lost."""

import signal
import time

import grpc

import tinsmith
from faults.processes import Training, hung
from faults.recovering import Seen, model_of, state, train
from tinsmith import v1 as pb
from tinsmith.errors import from_rpc_error


def test_who_waits_is_told_and_what_was_taken_in_is_made_after_the_restart(
    training: Training, undisturbed: Seen
) -> None:
    """The call under way, whose ranks stand still, and the one behind it count as taken in; the one
    behind a gap does not. Nobody's connection is just cut."""
    training.start_rank()
    client = model_of(tinsmith.ServiceClient(base_url=training.address))
    seen = train(client, 0, 2)
    steps = [pb.OptimStepRequest(model_id=client.model_id, seq_id=n) for n in (5, 6, 8)]
    with hung(training.ranks[0].pid), grpc.insecure_channel(training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        calls = [stub.OptimStep.future(step) for step in steps]  # type: ignore[attr-defined]
        while state(training, client.model_id).pending_calls < len(calls):
            time.sleep(0.01)
        training.server.signal(signal.SIGTERM)
        for call in calls:
            told = from_rpc_error(call.exception())
            assert (told.reason, told.retry_after_s) == ("SHUTTING_DOWN", 1.0)
        assert training.server.wait() == 0
    training.restart_server()
    with grpc.insecure_channel(training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        made = [stub.OptimStep(step, timeout=60, wait_for_ready=True) for step in steps[:2]]
        assert [answer.metrics["step:last"] for answer in made] == [3, 4]
    assert state(training, client.model_id).next_seq_id == 7
    assert seen == undisturbed[:4]

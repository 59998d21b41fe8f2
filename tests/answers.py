"""Calls of every kind, and their answers asked for again."""

from typing import Any

from data import datum_to_pb, make_data
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster

LOSS = pb.LossFn(cross_entropy=pb.CrossEntropyLoss())
WAIT_S = 60


def data_of(count: int) -> list[pb.Datum]:
    return [datum_to_pb(datum) for datum in make_data(1, count)]


def calls_of(stubs: Cluster, model_id: str) -> dict[str, list[Any]]:
    """One call of each kind, numbered from 1: its messages of the answer, by case."""
    training = stubs.training
    computed = {"model_id": model_id, "loss_fn": LOSS, "data": data_of(3)}
    save = {"model_id": model_id, "kind": pb.CheckpointKind.CHECKPOINT_KIND_TRAINING, "name": "a"}
    forward = pb.ForwardRequest(seq_id=1, **computed)
    backward = pb.ForwardBackwardRequest(seq_id=2, **computed)
    answers = {
        "forward": list(training.Forward(iter([forward]))),
        "forward_backward": list(training.ForwardBackward(iter([backward]))),
        "optim_step": [training.OptimStep(pb.OptimStepRequest(model_id=model_id, seq_id=3))],
        "save_checkpoint": [training.SaveCheckpoint(pb.SaveCheckpointRequest(seq_id=4, **save))],
    }
    path = answers["save_checkpoint"][0].checkpoint_path
    load = pb.LoadCheckpointRequest(model_id=model_id, seq_id=5, checkpoint_path=path)
    answers["load_checkpoint"] = [training.LoadCheckpoint(load)]
    return answers


def answer(stubs: Cluster, model_id: str, seq_id: int, **fields: Any) -> list[pb.GetAnswerResponse]:
    request = pb.GetAnswerRequest(model_id=model_id, seq_id=seq_id, **fields)
    return list(stubs.training.GetAnswer(request, timeout=WAIT_S))

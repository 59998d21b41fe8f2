"""Calls to the Training service, as messages: one small datum and what is asked of it."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster

TOKENS = [5, 6, 7, 8, 9]


def tokens_of(values: Iterable[int]) -> pb.ModelInput:
    """A prompt."""
    return pb.ModelInput(chunks=[pb.ModelInputChunk(tokens=tensors.encode(list(values)))])


def datum(**inputs: Any) -> pb.Datum:
    """One that predicts each token plus one; `inputs` replace its arrays."""
    arrays = {"target_tokens": np.array(TOKENS) + 1, "weights": np.ones(5, np.float32), **inputs}
    packed = {k: v if isinstance(v, pb.Tensor) else tensors.encode(v) for k, v in arrays.items()}
    return pb.Datum(model_input=tokens_of(TOKENS), loss_fn_inputs=packed)


CROSS_ENTROPY = pb.LossFn(cross_entropy=pb.CrossEntropyLoss())


def call(model_id: str, seq_id: int = 0, **fields: Any) -> pb.ForwardBackwardRequest:
    """A whole call with one datum, unless the fields say otherwise."""
    filled = {"loss_fn": CROSS_ENTROPY, "data": [datum()], **fields}
    return pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, **filled)


def forward_backward(
    stubs: Cluster, *messages: pb.ForwardBackwardRequest
) -> list[pb.ForwardBackwardResponse]:
    """Make a call; all that it answers."""
    return list(stubs.training.ForwardBackward(iter(messages)))


def step(model_id: str, seq_id: int, **adam: float) -> pb.OptimStepRequest:
    """A step, with the server's defaults where nothing is given."""
    params = pb.AdamParams(**adam) if adam else None
    return pb.OptimStepRequest(model_id=model_id, seq_id=seq_id, adam_params=params)


def logprobs(stubs: Cluster, model_id: str) -> np.ndarray:
    """Those of the one datum now, `(5,)`."""
    responses = stubs.training.Forward(
        iter([pb.ForwardRequest(model_id=model_id, loss_fn=CROSS_ENTROPY, data=[datum()])])
    )
    outputs = [output for response in responses for output in response.outputs]
    return tensors.decode(outputs[0].loss_fn_outputs["logprobs"])

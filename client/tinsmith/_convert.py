"""The client's types to messages and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC
from typing import Any

import numpy as np

from tinsmith import _check, tensors
from tinsmith.checkpoints import PUBLIC_MARK, shown
from tinsmith.errors import InvalidArgumentError, unsupported
from tinsmith.types.inputs import Datum, ModelInput, SamplingParams, check_datum, int_tokens
from tinsmith.types.outputs import (
    CHECKPOINT_TYPES,
    Checkpoint,
    ForwardBackwardOutput,
)
from tinsmith.types.samples import SampledTokens, StopReason
from tinsmith.types.tensor import TensorData, from_any
from tinsmith.v1 import (
    checkpoint_service_pb2,
    sampler_service_pb2,
    training_service_pb2,
    types_pb2,
)

MESSAGE_BYTES = 256 * 1024
"""A call's data are cut into messages of about this size: while one is read at the other end, the
next is serialised here, into memory that the one before has left. Serialising a megabyte at once
takes new pages from the system each time, at several times the cost of sending them."""

DATUM_BYTES = 256
"""Bytes that a datum counts for beside its arrays, so that a message has some thousand data:
servers limit the items of one message (`message_items_max`)."""

ComputeRequest = training_service_pb2.ForwardRequest | training_service_pb2.ForwardBackwardRequest

STOP_REASONS: Mapping[int, StopReason] = {
    sampler_service_pb2.STOP_REASON_STOP: "stop",
    sampler_service_pb2.STOP_REASON_LENGTH: "length",
}


def model_input_to_pb(model_input: ModelInput, where: str) -> types_pb2.ModelInput:
    """Write tokens; `where` names the field in an error."""
    message = types_pb2.ModelInput()
    tensors.write(message.chunks.add().tokens, int_tokens(model_input, where))
    return message


def requests_of(
    kind: type[ComputeRequest], data: Sequence[Datum], loss_fn: types_pb2.LossFn
) -> list[ComputeRequest]:
    """Write a call with data: messages of about `MESSAGE_BYTES`; a larger datum has its own.

    The first still lacks the model and the number.

    Raises:
        InvalidArgumentError: There are no data, or one is no Datum or has no token.
    """
    if not data:
        raise InvalidArgumentError("data: must not be empty", field="data", reason="MISSING_FIELD")
    requests: list[ComputeRequest] = [kind(loss_fn=loss_fn)]
    weighted = loss_fn.HasField("cross_entropy")  # each token counts once where nothing is said
    room = MESSAGE_BYTES
    for index, datum in enumerate(data):
        check_datum(datum, index)
        tokens = int_tokens(datum.model_input, f"data[{index}].model_input")
        # Read once more: the mapping is the caller's to change until now.
        inputs = {
            _check.text(name, f"data[{index}].loss_fn_inputs"): from_any(name, value).view()
            for name, value in datum.loss_fn_inputs.items()
        }
        if weighted and "weights" not in inputs and "target_tokens" in inputs:
            inputs["weights"] = np.ones(inputs["target_tokens"].shape, np.float32)
        nbytes = DATUM_BYTES + tokens.nbytes + sum(array.nbytes for array in inputs.values())
        if nbytes > room and requests[-1].data:
            requests.append(kind())
            room = MESSAGE_BYTES
        room -= nbytes
        written = requests[-1].data.add()
        tensors.write(written.model_input.chunks.add().tokens, tokens)
        for name, array in inputs.items():
            tensors.write(written.loss_fn_inputs[name], array)
    return requests


INSTEAD: Mapping[str, str] = {
    "stable_reinforce": "its formula is not public; loss_fn='importance_sampling' takes these data",
    "custom": "losses are not uploaded; forward_backward_custom takes the function itself",
}
"""Losses of Tinker's that there are not, and what does their work."""


def loss_fn_to_pb(name: str, config: Mapping[str, float | str] | None) -> types_pb2.LossFn:
    """Write a loss by name.

    Raises:
        InvalidArgumentError: There is no such loss or setting.
        UnimplementedError: It is one of `INSTEAD`.
    """
    if isinstance(name, str) and name in INSTEAD:
        raise unsupported("loss_fn", f"{name} is not supported: {INSTEAD[name]}")
    message = types_pb2.LossFn()
    known = [field.name for field in message.DESCRIPTOR.fields]
    if not isinstance(name, str) or name not in known:
        why = f"{_check.shown(name)} is not one of {', '.join(known)}"
        raise _check.refuse("loss_fn", why)
    if config is not None and not isinstance(config, Mapping):
        why = f"expected a mapping, got {type(config).__name__}"
        raise _check.refuse("loss_fn_config", why)
    settings = getattr(message, name)
    settings.SetInParent()
    allowed = [field.name for field in settings.DESCRIPTOR.fields]
    for key, value in (config or {}).items():
        where = f"loss_fn_config[{_check.shown(key)}]"
        if key not in allowed:
            raise _check.refuse(where, f"{name} has {', '.join(allowed) or 'no settings'}")
        setattr(settings, key, _check.real(value, where))
    return message


def output_from_pb(
    outputs: Iterable[Any], metrics: Mapping[str, float], count: int
) -> ForwardBackwardOutput:
    """Read results.

    Args:
        outputs: One for each datum.
        metrics: Of the call.
        count: Number of data.

    Raises:
        ValueError: They are not one for each datum, or cannot be read.
    """
    read = [
        {
            name: TensorData(tensors.decode(tensor))
            for name, tensor in output.loss_fn_outputs.items()
        }
        for output in outputs
    ]
    if len(read) != count:
        raise ValueError(f"{len(read)} outputs for {count} data")
    return ForwardBackwardOutput("TensorData", read, dict(metrics))


def sampling_params_to_pb(params: SamplingParams) -> sampler_service_pb2.SamplingParams:
    """Write sampling parameters; what is unset stays unset."""
    plain = {field.name: getattr(params, field.name) for field in fields(params)}
    plain["seed"] = _check.seed(params.seed, "sampling_params.seed")
    del plain["stop"]
    message = sampler_service_pb2.SamplingParams(**plain)
    if params.stop is not None:
        message.stop.CopyFrom(_stop_to_pb(params.stop))
    return message


def _stop_to_pb(stop: str | Sequence[str] | Sequence[int]) -> sampler_service_pb2.StopCondition:
    stops: list[Any] = [stop] if isinstance(stop, str) else list(stop)
    strings = [entry for entry in stops if isinstance(entry, str)]
    tokens = [entry for entry in stops if not isinstance(entry, str)]
    # No stop at all for an empty list, as in Tinker; else the model's own stops count too.
    return sampler_service_pb2.StopCondition(tokens=tokens, strings=strings, eos=bool(stops))


def delta_from_pb(delta: sampler_service_pb2.SequenceDelta) -> SampledTokens:
    """Read new tokens of one sequence."""
    return SampledTokens(
        delta.sequence_index,
        [int(token) for token in tensors.decode(delta.tokens)],
        [float(logprob) for logprob in tensors.decode(delta.logprobs)],
        STOP_REASONS.get(delta.stop_reason),
    )


def checkpoint_from_pb(message: checkpoint_service_pb2.Checkpoint) -> Checkpoint:
    """Read what is known of a checkpoint."""
    path = shown(message.checkpoint_path)
    _, kind, name = path.rsplit("/", 2)
    metadata = dict(message.user_metadata)
    return Checkpoint(
        checkpoint_id=f"{kind}/{name}",
        checkpoint_type=CHECKPOINT_TYPES[kind],
        time=message.create_time.ToDatetime(UTC),
        tinker_path=path,
        size_bytes=message.size_bytes,
        public=metadata.pop(PUBLIC_MARK, "") == "true",
        user_metadata=metadata,
        expires_at=message.expire_time.ToDatetime(UTC) if message.HasField("expire_time") else None,
    )

"""Data of training calls: from the SDK's protobuf into the contract's, and results back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith.gateway.v1 import tinker_pb2
from tinsmith.v1 import training_service_pb2, types_pb2
from tinsmithd.gateway.cluster import ComputeRequest
from tinsmithd.gateway.problems import Problem

MESSAGE_BYTES = 256 * 1024
"""A call's data are cut into messages of about this size."""
DATUM_BYTES = 256
"""Bytes that a datum counts for beside its arrays: servers limit the items of one message."""
DENSE_BYTES_MAX = 64 * 1024 * 1024
"""Bytes of a call's matrices whose rows came compressed, once they are whole: some bytes of a body
could stand for any number of them."""
OUTPUT_TYPE = "ArrayRecord"
_NOT_HERE = {
    "custom": "an uploaded loss is not computed here; pass the function itself to "
    "forward_backward_custom, which computes it in your process",
    "stable_reinforce": "its formula is not public; use loss_fn=importance_sampling, or ppo, "
    "cispo or gspo",
}
_DTYPES: Mapping[int, tuple[types_pb2.Dtype.ValueType, np.dtype[Any]]] = {
    tinker_pb2.D_TYPE_FLOAT32: (types_pb2.DTYPE_FLOAT32, np.dtype("<f4")),
    tinker_pb2.D_TYPE_INT64: (types_pb2.DTYPE_INT64, np.dtype("<i8")),
}
_BACK = {
    types_pb2.DTYPE_FLOAT32: tinker_pb2.D_TYPE_FLOAT32,
    types_pb2.DTYPE_INT64: tinker_pb2.D_TYPE_INT64,
    types_pb2.DTYPE_INT32: tinker_pb2.D_TYPE_INT32,
}


def loss_fn_of(name: str, config: Mapping[str, Any]) -> types_pb2.LossFn:
    """A loss by the SDK's name.

    Args:
        name: As `loss_fn` has it.
        config: `loss_fn_config`: numbers and texts.

    Raises:
        Problem: 400: it is not computed here, or has no such setting.
    """
    message = types_pb2.LossFn()
    known = [field.name for field in message.DESCRIPTOR.fields]
    if name not in known:
        why = _NOT_HERE.get(name, f"it is not one of {', '.join(known)}")
        raise Problem(400, f"loss_fn: {name[:40]!r}: {why}", field="loss_fn")
    settings = getattr(message, name)
    settings.SetInParent()
    allowed = [field.name for field in settings.DESCRIPTOR.fields]
    for key, value in config.items():
        where = f"loss_fn_config[{key[:40]!r}]"
        if key not in allowed:
            text = f"{where}: {name} has {', '.join(allowed) or 'no settings'}"
            raise Problem(400, text, field=where)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Problem(400, f"{where}: must be a number", field=where)
        setattr(settings, key, value)
    return message


def requests_of(
    message: tinker_pb2.ForwardBackwardRequest,
) -> Sequence[ComputeRequest]:
    """A call of the contract, in messages of about `MESSAGE_BYTES`, without model and number.

    Raises:
        Problem: 400: something cannot be said in the contract; the servers check the rest.
    """
    config: dict[str, Any] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        config[key] = getattr(value, value.WhichOneof("value") or "text")
    loss_fn = loss_fn_of(message.loss_fn, config)
    kind: type[Any] = training_service_pb2.ForwardBackwardRequest
    if message.forward_only:
        kind = training_service_pb2.ForwardRequest
    if not message.data:
        raise Problem(400, "data: must not be empty", field="data")
    requests = [kind(loss_fn=loss_fn, acknowledge=True)]
    room, dense_bytes = MESSAGE_BYTES, 0
    for index, datum in enumerate(message.data):
        nbytes = DATUM_BYTES + datum.ByteSize()
        if nbytes > room and requests[-1].data:
            requests.append(kind())
            room = MESSAGE_BYTES
        room -= nbytes
        written = requests[-1].data.add()
        dense_bytes = _write_datum(written, datum, f"data[{index}]", dense_bytes)
    return requests


def _write_datum(
    written: types_pb2.Datum, datum: tinker_pb2.Datum, where: str, dense_bytes: int
) -> int:
    """Write a datum; takes and returns the bytes of the call's matrices that were made whole."""
    chunks = written.model_input.chunks
    for index, chunk in enumerate(datum.model_input):
        if chunk.WhichOneof("chunk") != "encoded_text":
            field = f"{where}.model_input.chunks[{index}]"
            raise Problem(400, f"{field}: only text can be trained on here", field=field)
        tokens = chunks.add().tokens
        tokens.dtype, tokens.data = types_pb2.DTYPE_INT32, chunk.encoded_text.tokens
    for name, tensor in datum.loss_fn_inputs.items():
        field = f'{where}.loss_fn_inputs["{name[:40]}"]'
        if tensor.dtype not in _DTYPES:
            raise Problem(400, f"{field}: dtype must be float32 or int64", field=field)
        target = written.loss_fn_inputs[name]
        target.dtype, dtype = _DTYPES[tensor.dtype]
        target.shape.extend(tensor.shape)
        if tensor.WhichOneof("encoding") == "sparse_csr":
            target.data = dense_of(tensor, dtype, field, DENSE_BYTES_MAX - dense_bytes).tobytes()
            dense_bytes += len(target.data)
        else:
            target.data = tensor.dense
    return dense_bytes


def dense_of(
    tensor: tinker_pb2.Tensor, dtype: np.dtype[Any], field: str, bytes_max: int
) -> NDArray[Any]:
    """A matrix whose rows came compressed, whole; what is empty is 0.

    Args:
        tensor: The matrix.
        dtype: Of its elements.
        field: What it is called in a refusal.
        bytes_max: What is left of `DENSE_BYTES_MAX` for it.

    Raises:
        Problem: 400: it contradicts itself, or is too large.
    """
    sparse, shape = tensor.sparse_csr, list(tensor.shape)
    sizes = (len(sparse.values) % dtype.itemsize, len(sparse.crow_indices) % 8)
    if len(shape) != 2 or min(shape) < 0 or any(sizes) or len(sparse.col_indices) % 8:
        raise Problem(400, f"{field}: is no matrix with compressed rows", field=field)
    rows, columns = shape
    if rows * columns * dtype.itemsize > bytes_max:
        before = "" if bytes_max == DENSE_BYTES_MAX else ", with the matrices before it,"
        text = f"{field}: {rows} x {columns}{before} is more than {DENSE_BYTES_MAX} bytes"
        raise Problem(400, text, field=field)
    values = np.frombuffer(sparse.values, dtype)
    crow = np.frombuffer(sparse.crow_indices, "<i8")
    col = np.frombuffer(sparse.col_indices, "<i8")
    fits = len(crow) == rows + 1 and len(col) == len(values)
    if not fits or crow[0] != 0 or crow[-1] != len(values) or (np.diff(crow) < 0).any():
        raise Problem(400, f"{field}: its rows do not fit its values", field=field)
    if len(col) and not (col.min() >= 0 and col.max() < columns):
        raise Problem(400, f"{field}: a column is not in [0, {columns})", field=field)
    dense = np.zeros((rows, columns), dtype)
    dense[np.repeat(np.arange(rows), np.diff(crow)), col] = values
    return dense


def output_of(
    outputs: Iterable[training_service_pb2.DatumOutput], metrics: Mapping[str, float]
) -> tinker_pb2.ForwardBackwardOutput:
    """A result as the SDK reads it: arrays of data that follow each other stand in one record."""
    result = tinker_pb2.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE)
    result.metrics.update(metrics)
    record: list[Any] = []
    before: object = None
    for output in outputs:
        form = {
            name: (tensor.dtype, tuple(tensor.shape[1:]))
            for name, tensor in output.loss_fn_outputs.items()
        }
        if record and form != before:
            _write_record(result.loss_fn_outputs.add(), record)
            record = []
        record.append(output.loss_fn_outputs)
        before = form
    if record:
        _write_record(result.loss_fn_outputs.add(), record)
    return result


def _write_record(record: tinker_pb2.ArrayRecord, outputs: Sequence[Any]) -> None:
    record.num_datums = len(outputs)
    for name, first in outputs[0].items():
        field = record.fields[name]
        pieces = [output[name].data for output in outputs]
        field.data = b"".join(pieces)
        field.offsets = np.cumsum([0, *map(len, pieces)], dtype="<i8").tobytes()
        field.dtype = _BACK[first.dtype]
        field.trailing_shape.extend(first.shape[1:])

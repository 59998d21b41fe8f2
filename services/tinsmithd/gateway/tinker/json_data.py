"""Data of training calls in JSON, as SDKs before 0.23 send them and those before 0.18 take them."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinsmith.gateway.v1 import tinker_pb2
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.room import int_of, number_of, object_of, text_of

SEQ_ID_MAX = 2**31 - 1
_DTYPES = {
    "float32": (tinker_pb2.D_TYPE_FLOAT32, "<f4"),
    "int64": (tinker_pb2.D_TYPE_INT64, "<i8"),
}
_NAMES = {tinker_pb2.D_TYPE_FLOAT32: "float32", tinker_pb2.D_TYPE_INT64: "int64"}


def header_of(body: Mapping[str, Any]) -> tuple[str, int]:
    """Model and number of a call.

    Raises:
        Problem: 400, naming the field.
    """
    return text_of(body, "model_id"), int_of(body, "seq_id", least=1, most=SEQ_ID_MAX)


def message_of(body: Mapping[str, Any], part: str) -> tinker_pb2.ForwardBackwardRequest:
    """A call as newer SDKs send it.

    Args:
        body: The request.
        part: `forward_backward_input` or `forward_input`.

    Raises:
        Problem: 400, naming the field.
    """
    model_id, seq_id = header_of(body)
    given = object_of(body, part)
    message = tinker_pb2.ForwardBackwardRequest(
        model_id=model_id,
        seq_id=seq_id,
        loss_fn=text_of(given, "loss_fn"),
        forward_only=part == "forward_input",
    )
    for key, value in object_of(given, "loss_fn_config").items():
        if isinstance(value, str):
            message.loss_fn_config_v2[key].text = value
        else:
            message.loss_fn_config_v2[key].number = number_of({key: value}, key)
    data = given.get("data")
    if not isinstance(data, list):
        raise _wrong("data", "must be a list")
    for index, datum in enumerate(data):
        _write_datum(message.data.add(), datum, f"data[{index}]")
    return message


def _wrong(field: str, why: str) -> Problem:
    return Problem(400, f"{field}: {why}", field=field)


def _write_datum(written: tinker_pb2.Datum, datum: Any, where: str) -> None:
    if not isinstance(datum, dict):
        raise _wrong(where, "must be an object")
    chunks = object_of(datum, "model_input").get("chunks")
    if not isinstance(chunks, list):
        raise _wrong(f"{where}.model_input.chunks", "must be a list")
    for index, chunk in enumerate(chunks):
        field = f"{where}.model_input.chunks[{index}]"
        if not isinstance(chunk, dict) or chunk.get("type", "encoded_text") != "encoded_text":
            raise _wrong(field, "only text can be trained on here")
        tokens = _array(chunk.get("tokens"), "<i4", f"{field}.tokens")
        written.model_input.add().encoded_text.tokens = tokens.tobytes()
    for name, tensor in object_of(datum, "loss_fn_inputs").items():
        _write_tensor(
            written.loss_fn_inputs[name], tensor, f'{where}.loss_fn_inputs["{name[:40]}"]'
        )


def _write_tensor(written: tinker_pb2.Tensor, tensor: Any, field: str) -> None:
    kind = tensor.get("dtype") if isinstance(tensor, dict) else None
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise _wrong(field, "must have a dtype, float32 or int64")
    written.dtype, dtype = _DTYPES[kind]
    values = _array(tensor.get("data"), dtype, field)
    shape = tensor.get("shape")
    if shape is not None:
        written.shape.extend(_array(shape, "<i8", f"{field}.shape").tolist())
    rows = tensor.get("sparse_crow_indices")
    if rows is None:
        written.dense = values.tobytes()
        return
    written.sparse_csr.values = values.tobytes()
    written.sparse_csr.crow_indices = _array(rows, "<i8", field).tobytes()
    columns = tensor.get("sparse_col_indices")
    written.sparse_csr.col_indices = _array(columns, "<i8", field).tobytes()


def _array(values: Any, dtype: str, field: str) -> Any:
    """A flat list of numbers, none of which changes by it."""
    if not isinstance(values, list):
        raise _wrong(field, "must be a list of numbers")
    wanted = (int, float) if dtype == "<f4" else (int,)
    if not all(isinstance(value, wanted) and value.__class__ is not bool for value in values):
        raise _wrong(field, f"must be a list of {'numbers' if dtype == '<f4' else 'whole numbers'}")
    try:
        with np.errstate(over="ignore"):  # the servers refuse what is not finite
            return np.array(values, dtype)
    except OverflowError:
        raise _wrong(
            field, f"has a number outside of {'32' if dtype == '<i4' else '64'} bits"
        ) from None


def output_as_json(body: bytes) -> Mapping[str, Any]:
    """A result as SDKs take it that know no protobuf."""
    message = tinker_pb2.ForwardBackwardOutput.FromString(body)
    outputs: list[dict[str, Any]] = []
    for record in message.loss_fn_outputs:
        data: list[dict[str, Any]] = [{} for _ in range(record.num_datums)]
        for name, field in record.fields.items():
            offsets = np.frombuffer(field.offsets, "<i8")
            dtype = "<f4" if field.dtype == tinker_pb2.D_TYPE_FLOAT32 else "<i8"
            for index, (begin, end) in enumerate(itertools.pairwise(offsets)):
                array = np.frombuffer(field.data[begin:end], dtype)
                array = array.reshape(-1, *field.trailing_shape)
                data[index][name] = {
                    "data": array.ravel().tolist(),
                    "dtype": _NAMES[field.dtype],
                    "shape": list(array.shape),
                }
        outputs += data
    return {
        "loss_fn_output_type": message.loss_fn_output_type,
        "loss_fn_outputs": outputs,
        "metrics": dict(message.metrics),
    }

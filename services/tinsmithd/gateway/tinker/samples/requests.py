"""Reads the body of `asample`: what a Sampler is asked, and how the answer is laid out."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith import tensors
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.room import INT64_MAX, bool_of, int_of

INT32_MAX = 2**31 - 1
SEEDS = 2**63 - 1
"""Seeds are taken modulo this, as the SDK's own service takes them."""
NUM_SAMPLES_MAX = 4096
"""More ids of sequences than this are not made before the Sampler is asked, which takes fewer."""
TARGET_CELLS_MAX = 1 << 24
"""Most cells of targets that are laid out before the Sampler is asked, which takes fewer."""
_FIELDS = frozenset(
    (
        "num_samples",
        "prompt",
        "sampling_params",
        "sampling_session_id",
        "seq_id",
        "base_model",
        "model_path",
        "prompt_logprobs",
        "topk_prompt_logprobs",
        "topk_sample_logprobs",
        "type",
        "target_prompt_logprobs",
        "prompt_alt_tokens_k",
        "prompt_logprobs_last_n",
        "record_stability_info",
    )
)
_PARAMS = frozenset(("max_tokens", "seed", "stop", "temperature", "top_k", "top_p"))
_CHUNKS = {
    "image": "images are not supported: the base models here read text alone",
    "image_asset_pointer": "images are not supported: the base models here read text alone",
    "dmel": "audio is not supported: the base models here read text alone",
}


@dataclass(frozen=True)
class SparseLayout:
    """Where the values of a sparse matrix stand.

    Attributes:
        columns: How many the matrix has.
        crow: int64, a row's beginning in `col`, and one more.
        col: int64, the column of each value.
    """

    columns: int
    crow: NDArray[np.int64]
    col: NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """What one call of `asample` asks.

    Attributes:
        request: For the Sampler; its weights are not filled in, and its seed only where the caller
            gave one.
        layout: How the targets came, where they were sparse.
    """

    request: pb.SampleRequest
    layout: SparseLayout | None


def read_sample(body: Mapping[str, Any]) -> Asked:
    """What a body asks.

    Raises:
        Problem: 400, with the field that is to blame.
    """
    _known(body, _FIELDS, "")
    if body.get("record_stability_info"):
        text = "there is no stable_reinforce here that would read it; use importance_sampling"
        raise _refuse("record_stability_info", text)
    request = pb.SampleRequest(
        num_samples=int_of(body, "num_samples", 1, least=1, most=NUM_SAMPLES_MAX),
        include_prompt_logprobs=bool_of(body, "prompt_logprobs", False),
        topk_prompt_logprobs=int_of(body, "topk_prompt_logprobs", 0, least=0, most=INT32_MAX),
        topk_sample_logprobs=int_of(body, "topk_sample_logprobs", 0, least=0, most=INT32_MAX),
        prompt_alt_tokens_k=int_of(body, "prompt_alt_tokens_k", 0, least=0, most=INT32_MAX),
    )
    prompt = _prompt(body.get("prompt"))
    tensors.write(request.prompt.chunks.add().tokens, prompt)
    _write_params(request.sampling_params, body.get("sampling_params"))
    if body.get("prompt_logprobs_last_n") is not None:
        if not request.include_prompt_logprobs:
            raise _refuse("prompt_logprobs", "needed by prompt_logprobs_last_n")
        last_n = int_of(body, "prompt_logprobs_last_n", 0, least=1, most=INT32_MAX)
        request.prompt_logprobs_last_n = last_n
    layout = None
    if body.get("target_prompt_logprobs") is not None:
        targets, layout = _targets(body["target_prompt_logprobs"], len(prompt) - 1)
        tensors.write(request.target_prompt_logprobs, targets)
    return Asked(request, layout)


def derived_seed(sampling_session_id: str, seq_id: int) -> int:
    """The seed of a call that brings none: the same one wherever and whenever it is made again."""
    text = f"{sampling_session_id}/{seq_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) % SEEDS


def sequence_ids(sampling_session_id: str, seq_id: int, count: int) -> Sequence[str]:
    """What the sequences of a call are called, within their session and beyond."""
    text = f"{sampling_session_id}/{seq_id}".encode()
    call = hashlib.blake2b(text, digest_size=12, person=b"sequences").hexdigest()
    return [f"{call}:{index}" for index in range(count)]


def _known(body: Mapping[str, Any], names: frozenset[str], where: str) -> None:
    """Refuse a field that is not known here: a newer SDK means something by it."""
    for name in body.keys() - names:
        if body[name] not in (None, False, 0, "", [], {}):
            raise _refuse(f"{where}{name[:60]}", "this gateway does not know this field")


def _prompt(value: Any) -> NDArray[np.int32]:
    chunks = value.get("chunks") if isinstance(value, dict) else None
    if not isinstance(chunks, list):
        raise _refuse("prompt.chunks", f"expected a list, got {_kind(chunks)}")
    parts = []
    for index, chunk in enumerate(chunks):
        where = f"prompt.chunks[{index}]"
        kind = chunk.get("type", "encoded_text") if isinstance(chunk, dict) else None
        if kind != "encoded_text":
            why = _CHUNKS.get(kind) if isinstance(kind, str) else None
            raise _refuse(f"{where}.type", why or "expected encoded_text")
        parts.append(_tokens(chunk.get("tokens"), f"{where}.tokens"))
    if not sum(map(len, parts)):
        raise _refuse("prompt", "has no tokens")
    return np.concatenate(parts)


def _tokens(value: Any, where: str) -> NDArray[np.int32]:
    numbers = _integers(value, where)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() <= INT32_MAX):
        raise _refuse(where, f"a token is not in 0..{INT32_MAX}")
    return numbers.astype(np.int32)


def _integers(value: Any, where: str) -> NDArray[np.int64]:
    if not isinstance(value, list):
        raise _refuse(where, f"expected a list of whole numbers, got {_kind(value)}")
    if any(type(each) is not int for each in value):
        raise _refuse(where, "expected whole numbers")
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise _refuse(where, "a number is too large") from None


def _write_params(params: pb.SamplingParams, value: Any) -> None:
    where = "sampling_params"
    if value is None:
        return
    if not isinstance(value, dict):
        raise _refuse(where, f"expected an object, got {_kind(value)}")
    _known(value, _PARAMS, f"{where}.")
    for name, least in (("max_tokens", 1), ("top_k", -INT64_MAX)):
        number = value.get(name)
        if number is not None:
            if type(number) is not int or not least <= number <= INT64_MAX:
                message = f"expected a whole number from {least} to {INT64_MAX}"
                raise _refuse(f"{where}.{name}", message)
            setattr(params, name, number)
    if value.get("seed") is not None:
        if type(value["seed"]) is not int:
            raise _refuse(f"{where}.seed", f"expected a whole number, got {_kind(value['seed'])}")
        params.seed = value["seed"] % SEEDS
    for name in ("temperature", "top_p"):
        number = value.get(name)
        if number is not None:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise _refuse(f"{where}.{name}", f"expected a number, got {_kind(number)}")
            if abs(number) > 1e300:
                raise _refuse(f"{where}.{name}", "is too large")
            setattr(params, name, float(number))
    if value.get("stop") is not None:
        _write_stop(params.stop, value["stop"], f"{where}.stop")


def _write_stop(stop: pb.StopCondition, value: Any, where: str) -> None:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise _refuse(where, f"expected a text or a list, got {_kind(value)}")
    stop.SetInParent()
    stop.eos = bool(values)  # an empty list never stops; with others the model's own ones count too
    if all(isinstance(each, str) for each in values):
        stop.strings.extend(values)
    elif all(type(each) is int and abs(each) <= INT64_MAX for each in values):
        stop.tokens.extend(values)
    else:
        raise _refuse(where, "expected texts alone, or token ids alone")


def _targets(value: Any, rows: int) -> tuple[NDArray[np.int64], SparseLayout | None]:
    """Targets as (rows, K), and their layout where they came sparse: then K is as few as fit."""
    where = "target_prompt_logprobs"
    if not isinstance(value, dict):
        raise _refuse(where, f"expected an object, got {_kind(value)}")
    if value.get("dtype", "int64") != "int64":
        raise _refuse(f"{where}.dtype", "expected int64")
    data = _integers(value.get("data"), f"{where}.data")
    shape = value.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int for n in shape):
        raise _refuse(f"{where}.shape", "expected two lengths")
    columns = shape[1]
    if shape[0] != rows or not 1 <= columns <= INT32_MAX:
        shown = str(shape)[:60]
        raise _refuse(f"{where}.shape", f"{shown}, expected [{rows}, K] with K at least 1")
    if value.get("sparse_crow_indices") is not None:
        return _sparse(value, data, rows, columns)
    if rows * columns != len(data):
        raise _refuse(f"{where}.shape", f"{shape} does not hold {len(data)} values")
    return data.reshape(rows, columns), None


def _sparse(
    value: Mapping[str, Any], data: NDArray[np.int64], rows: int, columns: int
) -> tuple[NDArray[np.int64], SparseLayout]:
    where = "target_prompt_logprobs"
    crow = _integers(value["sparse_crow_indices"], f"{where}.sparse_crow_indices")
    col = _integers(value.get("sparse_col_indices"), f"{where}.sparse_col_indices")
    lengths = np.diff(crow)
    whole_rows = len(crow) == rows + 1 and crow[0] == 0 and crow[-1] == len(col) == len(data)
    if not whole_rows or (lengths < 0).any():
        raise _refuse(f"{where}.sparse_crow_indices", "do not fit the rows and the values")
    if len(col) and not (col.min() >= 0 and col.max() < columns):
        raise _refuse(f"{where}.sparse_col_indices", f"are not in 0..{columns - 1}")
    widest = max(1, int(lengths.max(initial=0)))
    if rows * widest > TARGET_CELLS_MAX:
        raise _refuse(where, f"{rows} rows with up to {widest} values each are too many")
    targets = np.full((rows, widest), -1, np.int64)
    targets[cells(crow)] = data
    return targets, SparseLayout(columns, crow, col)


def cells(crow: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the values of a sparse matrix when each row is pushed to the left."""
    lengths = np.diff(crow)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return rows, np.arange(crow[-1]) - np.repeat(crow[:-1], lengths)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), "a number")


def _refuse(field: str, message: str) -> Problem:
    return Problem(400, f"{field}: {message}", "INVALID_FIELD", field)

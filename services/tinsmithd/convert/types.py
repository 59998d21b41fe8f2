"""Messages of `types.proto` to domain values and back."""

import dataclasses
import math
import secrets
from collections.abc import Callable, Mapping, Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith.v1 import types_pb2 as pb
from tinsmithd import domain
from tinsmithd.convert.tensors import array_from_pb
from tinsmithd.domain import (
    MODEL_ID_PATTERN,
    NAME_PATTERN,
    AdamParams,
    BaseModelInfo,
    CheckpointKind,
    CheckpointPath,
    Datum,
    FullConfig,
    LoraConfig,
    LossFn,
    Tuning,
    may_be_given_id,
)
from tinsmithd.errors import InvalidArgument, Reason, over_limit

METADATA_ENTRIES_MAX = 64
METADATA_KEY_CHARACTERS_MAX = 128
METADATA_VALUE_CHARACTERS_MAX = 1024
REQUEST_ID_CHARACTERS_MAX = 128
LEASE_ID_CHARACTERS_MAX = 128
DIGEST_BYTES = 32
"""Length of a SHA-256."""
UNLIMITED = 1 << 63
"""A limit that another server has held already."""

_KINDS = {
    pb.CHECKPOINT_KIND_TRAINING: CheckpointKind.TRAINING,
    pb.CHECKPOINT_KIND_SAMPLER: CheckpointKind.SAMPLER,
}
_CODES = {kind: code for code, kind in _KINDS.items()}
_DTYPES: Mapping[str, pb.Dtype.ValueType] = {
    "float32": pb.DTYPE_FLOAT32,
    "bfloat16": pb.DTYPE_BFLOAT16,
}
_ENGINES: Mapping[str, pb.Engine.ValueType] = {
    "deepspeed": pb.ENGINE_DEEPSPEED,
    "reference": pb.ENGINE_REFERENCE,
    "transformers": pb.ENGINE_TRANSFORMERS,
    "vllm": pb.ENGINE_VLLM,
}


def tokens_from_pb(message: pb.ModelInput, field: str, chunks_max: int) -> NDArray[np.int64]:
    """Read a model input of at most `chunks_max` chunks as int64 token ids `(T,)`, T above 0."""
    if not message.chunks:
        raise InvalidArgument(f"{field}.chunks", "must not be empty", Reason.MISSING_FIELD)
    check_count(f"{field}.chunks", message.chunks, "chunks_max", chunks_max)
    parts = []
    for index, chunk in enumerate(message.chunks):
        where = f"{field}.chunks[{index}]"
        if chunk.WhichOneof("content") != "tokens":
            raise InvalidArgument(where, "content is unset or unknown", Reason.MISSING_FIELD)
        part = array_from_pb(chunk.tokens, f"{where}.tokens", "int")
        if part.ndim != 1:
            raise InvalidArgument(
                f"{where}.tokens", f"shape {list(part.shape)}, expected (n,)", Reason.INVALID_SHAPE
            )
        parts.append(part)
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if not tokens.size:
        raise InvalidArgument(f"{field}.chunks", "has no token", Reason.MISSING_FIELD)
    return tokens


def datum_from_pb(
    message: pb.Datum,
    field: str,
    *,
    chunks_max: int = UNLIMITED,
    loss_fn_inputs_max: int = UNLIMITED,
) -> Datum:
    """Read one datum: token ids int64 `(T,)`, and float32 or int64 arrays by name.

    The rules of calls check shapes and names against the loss.
    """
    where = f"{field}.loss_fn_inputs"
    check_count(where, message.loss_fn_inputs, "loss_fn_inputs_max", loss_fn_inputs_max)
    inputs = {
        name: array_from_pb(
            message.loss_fn_inputs[name],
            f'{field}.loss_fn_inputs["{name}"]',
            "int" if name == "target_tokens" else "float",
        )
        for name in sorted(message.loss_fn_inputs)
    }
    tokens = tokens_from_pb(message.model_input, f"{field}.model_input", chunks_max)
    return Datum(tokens, inputs)


def loss_fn_from_pb(message: pb.LossFn, field: str) -> LossFn:
    """Read a loss with its defaults filled in; its settings are at least 0."""
    case = message.WhichOneof("loss_fn")
    if case is None:
        raise InvalidArgument(field, f"set one of {', '.join(domain.LOSSES)}", Reason.MISSING_FIELD)
    config = getattr(message, case)
    values = {}
    for descriptor, value in config.ListFields():
        where = f"{field}.{case}.{descriptor.name}"
        values[descriptor.name] = finite(value, where, low=0.0)
    loss = domain.LOSSES[case](**values)
    low = getattr(loss, "clip_low_threshold", 0.0)
    if getattr(loss, "clip_high_threshold", low) < low:
        raise InvalidArgument(
            f"{field}.{case}.clip_high_threshold", f"is below {low}, the lower one"
        )
    return loss


def loss_fn_to_pb(loss: LossFn) -> pb.LossFn:
    """Write a loss with all its settings."""
    message = pb.LossFn()
    config = getattr(message, loss.name)
    config.SetInParent()
    for name, value in vars(loss).items():
        setattr(config, name, value)
    return message


def lora_from_pb(message: pb.LoraConfig, field: str, rank_max: int) -> LoraConfig:
    """Read an adapter's shape with its defaults filled in; draws a seed where none is set."""
    if message.rank < 0:
        raise InvalidArgument(f"{field}.rank", f"{message.rank} is below 0")
    if message.rank > rank_max:
        raise over_limit(f"{field}.rank", "rank_max", message.rank, rank_max)
    rank = message.rank or 32
    if not 0 <= message.expert_rank <= rank:
        text = f"{message.expert_rank} is not between 0 and the rank, {rank}"
        raise InvalidArgument(f"{field}.expert_rank", text)
    alpha = finite(message.alpha, f"{field}.alpha", low=0.0)
    lora = LoraConfig(
        rank=rank,
        alpha=alpha or 32.0,
        seed=message.seed if message.HasField("seed") else secrets.randbits(31),
        train_attn=message.train_attn if message.HasField("train_attn") else True,
        train_mlp=message.train_mlp if message.HasField("train_mlp") else True,
        train_unembed=message.train_unembed if message.HasField("train_unembed") else True,
        expert_rank=message.expert_rank,
    )
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise InvalidArgument(field, "one of train_attn, train_mlp and train_unembed must be true")
    return lora


def lora_to_pb(lora: LoraConfig) -> pb.LoraConfig:
    """Write an adapter's shape; a seed below 0, which earlier releases took, keeps its bits."""
    return pb.LoraConfig(**{**vars(lora), "seed": lora.seed % (1 << 64)})


def tuning_from_pb(message: Any, prefix: str, rank_max: int) -> Tuning:
    """Read the tuning of a message that has a `oneof tuning`.

    Args:
        message: Has `lora_config`, `full_config` and so on.
        prefix: Stands before the names of its fields in errors, such as "header.".
        rank_max: Largest LoRA rank.
    """
    # Unset is an adapter: a case that is not known was refused with its message.
    case = message.WhichOneof("tuning") or "lora_config"
    if case not in _TUNINGS:
        raise InvalidArgument(f"{prefix}{case}", "this server does not know it")
    read, _ = _TUNINGS[case]
    return read(getattr(message, case), f"{prefix}{case}", rank_max)


def tuning_to_pb(tuning: Tuning) -> dict[str, Any]:
    """Write a tuning as an argument of a message that has a `oneof tuning`."""
    case = f"{tuning.kind}_config"
    _, write = _TUNINGS[case]
    return {case: write(tuning)}


_TUNINGS: Mapping[str, tuple[Callable[[Any, str, int], Tuning], Callable[[Any], Any]]] = {
    "lora_config": (lora_from_pb, lora_to_pb),
    "full_config": (lambda *_: FullConfig(), lambda _: pb.FullConfig()),
}
"""How the message of each tuning is read and written, by its case."""


def adam_from_pb(message: pb.AdamParams, field: str) -> AdamParams:
    """Read the settings of an optimizer step with their defaults filled in; betas are below 1."""
    values = {}
    for descriptor, value in message.ListFields():
        where = f"{field}.{descriptor.name}"
        below = 1.0 if descriptor.name in ("beta1", "beta2") else None
        values[descriptor.name] = finite(value, where, low=0.0, below=below)
    return AdamParams(**values)


def adam_to_pb(adam: AdamParams) -> pb.AdamParams:
    """Write the settings of an optimizer step."""
    return pb.AdamParams(**vars(adam))


def base_model_to_pb(info: BaseModelInfo) -> pb.BaseModel:
    """Write the description of a base model."""
    return pb.BaseModel(**{**dataclasses.asdict(info), "dtype": _DTYPES[info.dtype]})


def base_model_from_pb(message: pb.BaseModel, field: str) -> BaseModelInfo:
    """Read the description of a base model."""
    values = {each.name: getattr(message, each.name) for each in dataclasses.fields(BaseModelInfo)}
    for name, code in _DTYPES.items():
        if code == message.dtype:
            return BaseModelInfo(**{**values, "dtype": name})
    raise InvalidArgument(f"{field}.dtype", f"weights have no element type {message.dtype}")


def engine_to_pb(name: str) -> pb.Engine.ValueType:
    """Write an engine's name; ENGINE_UNSPECIFIED where the contract has no number for it."""
    return _ENGINES.get(name, pb.ENGINE_UNSPECIFIED)


def kind_from_pb(value: int, field: str) -> CheckpointKind:
    """Read a checkpoint kind, which must be set and known."""
    for code, kind in _KINDS.items():
        if code == value:
            return kind
    if value == pb.CHECKPOINT_KIND_UNSPECIFIED:
        raise InvalidArgument(field, "set TRAINING or SAMPLER", Reason.MISSING_FIELD)
    raise InvalidArgument(field, f"unknown kind {value}, expected TRAINING or SAMPLER")


def kind_to_pb(kind: CheckpointKind) -> pb.CheckpointKind.ValueType:
    """Write a checkpoint kind."""
    return _CODES[kind]


def path_from_pb(text: str, field: str) -> CheckpointPath:
    """Read a checkpoint path."""
    if not text:
        raise InvalidArgument(field, "must be set", Reason.MISSING_FIELD)
    try:
        return CheckpointPath.parse(text)
    except ValueError as error:
        raise InvalidArgument(field, str(error), Reason.INVALID_NAME) from error


def name_from_pb(text: str, field: str) -> str:
    """Read a name that is data and never a path."""
    if not NAME_PATTERN.fullmatch(text):
        raise InvalidArgument(field, f"must match {NAME_PATTERN.pattern}", Reason.INVALID_NAME)
    return text


def model_id_from_pb(text: str, field: str) -> str:
    """Read the id that a new model shall have; empty where the server is to give one."""
    if text and not MODEL_ID_PATTERN.fullmatch(text):
        message = f"must match {MODEL_ID_PATTERN.pattern}"
        raise InvalidArgument(field, message, Reason.INVALID_NAME)
    if may_be_given_id(text):
        message = "32 hex digits are the server's to give"
        raise InvalidArgument(field, message, Reason.INVALID_NAME)
    return text


def request_id_from_pb(text: str, field: str) -> str:
    """Read the key under which a request is known again; empty where it is not to be."""
    check_count(field, text, "request_id_characters_max", REQUEST_ID_CHARACTERS_MAX)
    return text


def lease_id_from_pb(text: str, field: str) -> str:
    """Read the id of a lease; empty where the lease can only run out."""
    check_count(field, text, "lease_id_characters_max", LEASE_ID_CHARACTERS_MAX)
    return text


def digest_from_pb(digest: bytes, field: str) -> bytes | None:
    """Read a SHA-256 of 32 bytes; None where it is unset."""
    if len(digest) not in (0, DIGEST_BYTES):
        text = f"has {len(digest)} bytes, a digest has {DIGEST_BYTES}"
        raise InvalidArgument(field, text)
    return digest or None


def metadata_from_pb(entries: Mapping[str, str], field: str) -> dict[str, str]:
    """Read user metadata: texts by non-empty keys, within the limits above."""
    name = "user_metadata"
    check_count(field, entries, f"{name}_entries_max", METADATA_ENTRIES_MAX)
    for key, value in entries.items():
        if not key:
            raise InvalidArgument(field, "a key is empty")
        check_count(field, key, f"{name}_key_characters_max", METADATA_KEY_CHARACTERS_MAX)
        where = f'{field}["{key}"]'
        check_count(where, value, f"{name}_value_characters_max", METADATA_VALUE_CHARACTERS_MAX)
    return dict(entries)


def check_count(field: str, things: Sized, limit: str, most: int) -> None:
    """Refuse what is too much, before anything is done with it.

    Raises:
        InvalidArgument: There are more than `most` (LIMIT_EXCEEDED).
    """
    if len(things) > most:
        raise over_limit(field, limit, len(things), most)


def finite(value: float, field: str, *, low: float, below: float | None = None) -> float:
    """Return a number that is finite, at least `low`, and under `below` where that is given.

    Raises:
        InvalidArgument: It is another one (NON_FINITE, INVALID_FIELD).
    """
    if not math.isfinite(value):
        raise InvalidArgument(field, "is not finite", Reason.NON_FINITE)
    if value < low:
        raise InvalidArgument(field, f"{value:g} is below {low:g}")
    if below is not None and value >= below:
        raise InvalidArgument(field, f"{value:g} is not below {below:g}")
    return value

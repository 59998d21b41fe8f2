"""What servers say, as records of plain values: the same for tables and for `--json`."""

import math
from collections.abc import Mapping
from datetime import UTC
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from tinsmith.v1 import checkpoint_service_pb2, training_service_pb2, types_pb2

Record = Mapping[str, Any]


def moment_of(timestamp: Timestamp) -> str | None:
    """ISO 8601 in UTC; None where it is unset, or no time that there can be."""
    if not timestamp.seconds:
        return None
    try:
        return timestamp.ToDatetime(UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError):
        return None


def word_of(enum: Any, number: int) -> str:
    """A value of a generated enum, in lower case without its prefix; its number where unknown."""
    try:
        name: str = enum.Name(number)
    except ValueError:
        return str(number)
    first: str = enum.Name(0)
    return name.removeprefix(first.removesuffix("UNSPECIFIED")).lower()


def finite(value: Any) -> Any:
    """The same with `"NaN"`, `"Infinity"` and `"-Infinity"` for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def model_record(model: training_service_pb2.Model) -> Record:
    """What is known of a model."""
    return {
        "model_id": model.model_id,
        "owner": model.owner,
        "base_model": model.base_model,
        "tuning": _tuning(model),
        "state": word_of(training_service_pb2.ModelState, model.state),
        "state_message": model.state_message,
        "step_count": model.step_count,
        "next_seq_id": model.next_seq_id,
        "pending_calls": model.pending_calls,
        "create_time": moment_of(model.create_time),
        "last_request_time": moment_of(model.last_request_time),
        "user_metadata": dict(model.user_metadata),
    }


def step_record(step: training_service_pb2.Step) -> Record:
    """What is known of an optimizer step."""
    return {
        "seq_id": step.seq_id,
        "step_count": step.step_count,
        "create_time": moment_of(step.create_time),
        "metrics": dict(step.metrics),
    }


def checkpoint_record(checkpoint: checkpoint_service_pb2.Checkpoint) -> Record:
    """What is known of a checkpoint; `files` is empty in a list of checkpoints."""
    return {
        "checkpoint_path": checkpoint.checkpoint_path,
        "model_id": checkpoint.model_id,
        "owner": checkpoint.owner,
        "kind": word_of(types_pb2.CheckpointKind, checkpoint.kind),
        "name": checkpoint.name,
        "base_model": checkpoint.base_model,
        "tuning": _tuning(checkpoint),
        "step_count": checkpoint.step_count,
        "create_time": moment_of(checkpoint.create_time),
        "expire_time": moment_of(checkpoint.expire_time),
        "ephemeral": checkpoint.ephemeral,
        "size_bytes": checkpoint.size_bytes,
        "digest": checkpoint.digest.hex(),
        "files": [
            {"name": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256.hex()}
            for file in checkpoint.files
        ],
        "user_metadata": dict(checkpoint.user_metadata),
    }


def base_model_record(model: types_pb2.BaseModel) -> Record:
    """What is known of a base model."""
    return {
        "name": model.name,
        "architecture": model.architecture,
        "vocab_size": model.vocab_size,
        "context_length": model.context_length,
        "dtype": word_of(types_pb2.Dtype, model.dtype),
        "layer_count": model.layer_count,
        "parameter_count": model.parameter_count,
    }


def _tuning(
    holder: training_service_pb2.Model | checkpoint_service_pb2.Checkpoint,
) -> Record:
    case = holder.WhichOneof("tuning")
    if case == "full_config":
        return {"kind": "full"}
    if case != "lora_config":
        return {"kind": "unknown"}
    lora = holder.lora_config
    return {"kind": "lora"} | {
        field.name: getattr(lora, field.name) for field in lora.DESCRIPTOR.fields
    }


def tuning_text(tuning: Record) -> str:
    """A tuning in a word or two."""
    if tuning["kind"] != "lora":
        return str(tuning["kind"])
    parts = [part for part in ("attn", "mlp", "unembed") if tuning.get(f"train_{part}")]
    where = "" if len(parts) == 3 else f" ({', '.join(parts)})"
    return f"lora {tuning['rank']}{where}"

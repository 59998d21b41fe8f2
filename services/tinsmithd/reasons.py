"""Why a call can fail, and what comes with each reason.

Made from `protos/tinsmith/v1/error_reason.proto` by `make protos`. Do not edit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Rule:
    """What always holds for a reason.

    Attributes:
        status: Name of its gRPC status code.
        metadata: Keys that may come with it.
        retry: Whether there is a delay after which the same call can succeed: never, always or
            sometimes.
    """

    status: str
    metadata: frozenset[str]
    retry: str


class Reason(StrEnum):
    """Machine-readable cause, sent as `google.rpc.ErrorInfo.reason`."""

    MISSING_FIELD = "MISSING_FIELD"
    INVALID_FIELD = "INVALID_FIELD"
    INVALID_SHAPE = "INVALID_SHAPE"
    INVALID_DTYPE = "INVALID_DTYPE"
    INVALID_NAME = "INVALID_NAME"
    NON_FINITE = "NON_FINITE"
    TOKEN_OUT_OF_RANGE = "TOKEN_OUT_OF_RANGE"
    UNKNOWN_LOSS_INPUT = "UNKNOWN_LOSS_INPUT"
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    MALFORMED_STREAM = "MALFORMED_STREAM"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    CHECKPOINT_NOT_FOUND = "CHECKPOINT_NOT_FOUND"
    BASE_MODEL_NOT_FOUND = "BASE_MODEL_NOT_FOUND"
    SEQ_ID_CONFLICT = "SEQ_ID_CONFLICT"
    REQUEST_ID_CONFLICT = "REQUEST_ID_CONFLICT"
    CHECKPOINT_EXISTS = "CHECKPOINT_EXISTS"
    SEQ_ID_GAP = "SEQ_ID_GAP"
    ANSWER_EXPIRED = "ANSWER_EXPIRED"
    WRONG_CHECKPOINT_KIND = "WRONG_CHECKPOINT_KIND"
    INCOMPATIBLE_CHECKPOINT = "INCOMPATIBLE_CHECKPOINT"
    NON_FINITE_GRADIENT = "NON_FINITE_GRADIENT"
    QUEUE_FULL = "QUEUE_FULL"
    TOO_MANY_MODELS = "TOO_MANY_MODELS"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    STORAGE_FULL = "STORAGE_FULL"
    RANK_GROUP_UNAVAILABLE = "RANK_GROUP_UNAVAILABLE"
    SAMPLER_UNAVAILABLE = "SAMPLER_UNAVAILABLE"
    CHECKPOINT_UNAVAILABLE = "CHECKPOINT_UNAVAILABLE"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    MODEL_LOST = "MODEL_LOST"
    CHECKPOINT_CORRUPT = "CHECKPOINT_CORRUPT"
    INTERNAL = "INTERNAL"
    RANK_GROUP_TAKEN = "RANK_GROUP_TAKEN"
    CALL_POISONED = "CALL_POISONED"
    RANK_GROUP_MISMATCH = "RANK_GROUP_MISMATCH"
    STALE_EPOCH = "STALE_EPOCH"
    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    CHECKPOINT_REPLACED = "CHECKPOINT_REPLACED"
    SERVER_BUSY = "SERVER_BUSY"
    STREAM_STALLED = "STREAM_STALLED"
    CALL_NOT_FOUND = "CALL_NOT_FOUND"
    DEPOSIT_NOT_FOUND = "DEPOSIT_NOT_FOUND"
    MODEL_EXISTS = "MODEL_EXISTS"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    ISSUER_UNAVAILABLE = "ISSUER_UNAVAILABLE"
    MODEL_RESTORED = "MODEL_RESTORED"
    OTHER_SHARD = "OTHER_SHARD"


RULES: Mapping[Reason, Rule] = {
    Reason.MISSING_FIELD: Rule("INVALID_ARGUMENT", frozenset({"field"}), "never"),
    Reason.INVALID_FIELD: Rule("INVALID_ARGUMENT", frozenset({"field"}), "never"),
    Reason.INVALID_SHAPE: Rule("INVALID_ARGUMENT", frozenset({"field"}), "never"),
    Reason.INVALID_DTYPE: Rule("INVALID_ARGUMENT", frozenset({"field"}), "never"),
    Reason.INVALID_NAME: Rule("INVALID_ARGUMENT", frozenset({"field"}), "never"),
    Reason.NON_FINITE: Rule("INVALID_ARGUMENT", frozenset({"field"}), "never"),
    Reason.TOKEN_OUT_OF_RANGE: Rule("INVALID_ARGUMENT", frozenset({"field"}), "never"),
    Reason.UNKNOWN_LOSS_INPUT: Rule("INVALID_ARGUMENT", frozenset({"field"}), "never"),
    Reason.LIMIT_EXCEEDED: Rule(
        "INVALID_ARGUMENT", frozenset({"allowed", "field", "limit", "value"}), "never"
    ),
    Reason.MALFORMED_STREAM: Rule("INVALID_ARGUMENT", frozenset({"field"}), "never"),
    Reason.MODEL_NOT_FOUND: Rule("NOT_FOUND", frozenset(), "never"),
    Reason.CHECKPOINT_NOT_FOUND: Rule("NOT_FOUND", frozenset(), "never"),
    Reason.BASE_MODEL_NOT_FOUND: Rule("NOT_FOUND", frozenset(), "never"),
    Reason.SEQ_ID_CONFLICT: Rule("ALREADY_EXISTS", frozenset({"next_seq_id", "seq_id"}), "never"),
    Reason.REQUEST_ID_CONFLICT: Rule("ALREADY_EXISTS", frozenset(), "never"),
    Reason.CHECKPOINT_EXISTS: Rule("ALREADY_EXISTS", frozenset(), "never"),
    Reason.SEQ_ID_GAP: Rule("FAILED_PRECONDITION", frozenset({"next_seq_id", "seq_id"}), "always"),
    Reason.ANSWER_EXPIRED: Rule(
        "FAILED_PRECONDITION", frozenset({"next_seq_id", "seq_id"}), "never"
    ),
    Reason.WRONG_CHECKPOINT_KIND: Rule("FAILED_PRECONDITION", frozenset(), "never"),
    Reason.INCOMPATIBLE_CHECKPOINT: Rule("FAILED_PRECONDITION", frozenset(), "never"),
    Reason.NON_FINITE_GRADIENT: Rule("FAILED_PRECONDITION", frozenset({"since"}), "never"),
    Reason.QUEUE_FULL: Rule("RESOURCE_EXHAUSTED", frozenset({"limit", "value"}), "always"),
    Reason.TOO_MANY_MODELS: Rule("RESOURCE_EXHAUSTED", frozenset({"limit", "value"}), "never"),
    Reason.MESSAGE_TOO_LARGE: Rule("RESOURCE_EXHAUSTED", frozenset({"limit", "value"}), "never"),
    Reason.OUT_OF_MEMORY: Rule("RESOURCE_EXHAUSTED", frozenset(), "never"),
    Reason.STORAGE_FULL: Rule("RESOURCE_EXHAUSTED", frozenset({"limit", "value"}), "sometimes"),
    Reason.RANK_GROUP_UNAVAILABLE: Rule("UNAVAILABLE", frozenset(), "always"),
    Reason.SAMPLER_UNAVAILABLE: Rule("UNAVAILABLE", frozenset(), "always"),
    Reason.CHECKPOINT_UNAVAILABLE: Rule("UNAVAILABLE", frozenset(), "always"),
    Reason.SHUTTING_DOWN: Rule("UNAVAILABLE", frozenset(), "always"),
    Reason.MODEL_LOST: Rule("DATA_LOSS", frozenset({"model_id"}), "never"),
    Reason.CHECKPOINT_CORRUPT: Rule("DATA_LOSS", frozenset(), "never"),
    Reason.INTERNAL: Rule("INTERNAL", frozenset(), "never"),
    Reason.RANK_GROUP_TAKEN: Rule("FAILED_PRECONDITION", frozenset(), "never"),
    Reason.CALL_POISONED: Rule("FAILED_PRECONDITION", frozenset({"attempts"}), "never"),
    Reason.RANK_GROUP_MISMATCH: Rule("UNAVAILABLE", frozenset(), "always"),
    Reason.STALE_EPOCH: Rule("FAILED_PRECONDITION", frozenset({"epoch", "highest_epoch"}), "never"),
    Reason.STORAGE_UNAVAILABLE: Rule("UNAVAILABLE", frozenset(), "always"),
    Reason.CHECKPOINT_REPLACED: Rule("FAILED_PRECONDITION", frozenset(), "never"),
    Reason.SERVER_BUSY: Rule("RESOURCE_EXHAUSTED", frozenset({"limit", "value"}), "always"),
    Reason.STREAM_STALLED: Rule("UNAVAILABLE", frozenset(), "always"),
    Reason.CALL_NOT_FOUND: Rule("NOT_FOUND", frozenset({"next_seq_id", "seq_id"}), "never"),
    Reason.DEPOSIT_NOT_FOUND: Rule("NOT_FOUND", frozenset(), "never"),
    Reason.MODEL_EXISTS: Rule("ALREADY_EXISTS", frozenset({"model_id"}), "never"),
    Reason.UNAUTHENTICATED: Rule("UNAUTHENTICATED", frozenset(), "never"),
    Reason.PERMISSION_DENIED: Rule("PERMISSION_DENIED", frozenset(), "never"),
    Reason.QUOTA_EXCEEDED: Rule("RESOURCE_EXHAUSTED", frozenset({"limit", "value"}), "always"),
    Reason.ISSUER_UNAVAILABLE: Rule("UNAVAILABLE", frozenset(), "always"),
    Reason.MODEL_RESTORED: Rule(
        "FAILED_PRECONDITION", frozenset({"next_seq_id", "seq_id"}), "never"
    ),
    Reason.OTHER_SHARD: Rule("FAILED_PRECONDITION", frozenset({"training_address"}), "never"),
}

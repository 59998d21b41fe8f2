"""What a call is: what it asks for, how it is cut into batches, and what came of it."""

from tinsmithd.training.call.answer import Answer, CallKind, StoredAnswer
from tinsmithd.training.call.batches import (
    NOMINAL_TOKENS,
    BatchPlace,
    add_metrics,
    batch_sizes,
    batches_of,
)
from tinsmithd.training.call.call import Call
from tinsmithd.training.call.composition import (
    Composition,
    are_close,
    differing_keys,
    repeats_bits,
)
from tinsmithd.training.call.encoding import (
    answer_digest,
    decode_answer,
    decode_work,
    encode_answer,
    encode_work,
)
from tinsmithd.training.call.errors import (
    call_not_found,
    call_poisoned,
    model_lost,
    model_not_found,
    model_restored,
    shutting_down,
)
from tinsmithd.training.call.numbers import last_before
from tinsmithd.training.call.validate import check_datum
from tinsmithd.training.call.work import (
    ComputeWork,
    LoadWork,
    RefusedWork,
    SaveWork,
    StepWork,
    Work,
    changes_model,
    kind_of,
)

__all__ = [
    "NOMINAL_TOKENS",
    "Answer",
    "BatchPlace",
    "Call",
    "CallKind",
    "Composition",
    "ComputeWork",
    "LoadWork",
    "RefusedWork",
    "SaveWork",
    "StepWork",
    "StoredAnswer",
    "Work",
    "add_metrics",
    "answer_digest",
    "are_close",
    "batch_sizes",
    "batches_of",
    "call_not_found",
    "call_poisoned",
    "changes_model",
    "check_datum",
    "decode_answer",
    "decode_work",
    "differing_keys",
    "encode_answer",
    "encode_work",
    "kind_of",
    "last_before",
    "model_lost",
    "model_not_found",
    "model_restored",
    "repeats_bits",
    "shutting_down",
]

"""Errors that end a request, or keep an adapter from being loaded."""

from tinsmithd.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from tinsmithd.sampler.engines.transformers.jobs import Job


def tokens_of(job: Job) -> int:
    """Tokens whose keys and values a request may come to."""
    return len(job.request.prompt) + job.samples * job.request.params.max_tokens


def too_large(job: Job) -> InvalidArgument:
    """It never gets room."""
    count = tokens_of(job)
    return InvalidArgument(
        "num_samples",
        f"{count} tokens of keys and values are more than kv_cache_bytes_max allows",
        Reason.LIMIT_EXCEEDED,
        metadata={"limit": "kv_cache_bytes_max", "value": str(count)},
    )


def not_finite(job: Job) -> Exception:
    """Nothing can be drawn of its logits."""
    if job.adapter is None:
        return Internal("the base model's logits are not finite")
    text = "with this checkpoint the model's logits are not finite"
    return FailedPrecondition(text, Reason.INCOMPATIBLE_CHECKPOINT)


def does_not_fit(job: Job, why: str) -> ResourceExhausted:
    """The device has not enough memory for it."""
    text = f"a request of {tokens_of(job)} tokens does not fit into the Sampler's memory: {why}"
    return ResourceExhausted(text, Reason.OUT_OF_MEMORY)


def adapter_does_not_fit() -> ResourceExhausted:
    """The device has not enough memory for an adapter."""
    text = "the adapter does not fit into the Sampler's memory"
    return ResourceExhausted(text, Reason.OUT_OF_MEMORY)


def unavailable(text: str) -> Unavailable:
    """It can be asked for again, here or elsewhere."""
    return Unavailable(text, Reason.SAMPLER_UNAVAILABLE, retry_after_s=1.0)

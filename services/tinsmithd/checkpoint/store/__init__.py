"""Where the bytes of checkpoints are: a protocol, and in a file each what implements it."""

from tinsmithd.checkpoint.store.failures import (
    RETRY_FULL_S,
    RETRY_UNAVAILABLE_S,
    of_disk,
    storage_errors,
)
from tinsmithd.checkpoint.store.interface import Blob, Staging, Store, StoreBusy

__all__ = [
    "RETRY_FULL_S",
    "RETRY_UNAVAILABLE_S",
    "Blob",
    "Staging",
    "Store",
    "StoreBusy",
    "of_disk",
    "storage_errors",
]

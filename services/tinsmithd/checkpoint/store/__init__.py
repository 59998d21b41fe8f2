"""Where the bytes of checkpoints are: a protocol, and in a file each what implements it."""

from tinsmithd.checkpoint.store.failures import (
    RETRY_FULL_S,
    RETRY_UNAVAILABLE_S,
    of_disk,
    storage_errors,
    whole,
)
from tinsmithd.checkpoint.store.interface import (
    Blob,
    Staging,
    Store,
    StoreBusy,
    StoreUnusable,
    Unused,
)
from tinsmithd.checkpoint.store.log import Log, Snapshot

__all__ = [
    "RETRY_FULL_S",
    "RETRY_UNAVAILABLE_S",
    "Blob",
    "Log",
    "Snapshot",
    "Staging",
    "Store",
    "StoreBusy",
    "StoreUnusable",
    "Unused",
    "of_disk",
    "storage_errors",
    "whole",
]

"""The one client of CheckpointService that other servers have: verified, with deadlines."""

from tinsmithd.checkpoint_client.client import (
    CheckpointClient,
    CheckpointInfo,
    CheckpointReader,
    CheckpointWriter,
    NewCheckpoint,
    Patience,
    check_digest,
)

__all__ = [
    "CheckpointClient",
    "CheckpointInfo",
    "CheckpointReader",
    "CheckpointWriter",
    "NewCheckpoint",
    "Patience",
    "check_digest",
]

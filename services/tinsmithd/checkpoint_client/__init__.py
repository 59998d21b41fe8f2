"""The one client of CheckpointService that other servers have: verified, with deadlines."""

from tinsmithd.checkpoint_client.client import (
    CheckpointClient,
    CheckpointReader,
    CheckpointWriter,
    Patience,
    check_digest,
)

__all__ = [
    "CheckpointClient",
    "CheckpointReader",
    "CheckpointWriter",
    "Patience",
    "check_digest",
]

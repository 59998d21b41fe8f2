"""The one client of CheckpointService that other servers have: verified, with deadlines."""

from tinsmithd.checkpoint_client.client import CheckpointClient, CheckpointWriter, check_digest
from tinsmithd.checkpoint_client.local import Found, LocalFiles
from tinsmithd.checkpoint_client.patience import Patience
from tinsmithd.checkpoint_client.reader import CheckpointReader

__all__ = [
    "CheckpointClient",
    "CheckpointReader",
    "CheckpointWriter",
    "Found",
    "LocalFiles",
    "Patience",
    "check_digest",
]

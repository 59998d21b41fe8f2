"""What is to be saved as a checkpoint, as plain values that cross every floor."""

from collections.abc import Mapping
from dataclasses import dataclass

from tinsmithd.domain import CheckpointPath, Tuning


@dataclass(frozen=True)
class SaveOptions:
    """How the Checkpoint server is to keep a checkpoint.

    Attributes:
        ttl_seconds: None: for ever.
        overwrite: Replace what has the name.
        request_id: That of the call: by it the Checkpoint server knows a save that is made again
            after a crash, or sent again. Empty in calls that an older release wrote down.
        ephemeral: It lives as long as somebody uses it.
        lease_id: The caller's lease on it then.
    """

    path: CheckpointPath
    ttl_seconds: int | None
    overwrite: bool
    user_metadata: Mapping[str, str]
    request_id: str = ""
    ephemeral: bool = False
    lease_id: str = ""


@dataclass(frozen=True)
class NewCheckpoint:
    """What is to be saved, besides its files."""

    options: SaveOptions
    base_model: str
    tuning: Tuning
    step_count: int

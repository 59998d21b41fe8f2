"""Settings of the Checkpoint server."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from tinsmithd.config.base import ServerConfig, broken_rule
from tinsmithd.config.fields import MIB, Address, Count, Number


class CheckpointConfig(ServerConfig):
    """The Checkpoint server."""

    section: ClassVar[str] = "checkpoint"

    listen_address: Address = "127.0.0.1:50053"
    """Where to listen; port 0 takes a free one and logs it."""
    message_bytes_max: Count = 8 * MIB
    """Largest message received; a piece of a file has up to 4 MiB."""
    data_folder: str = "tinsmith-data/checkpoints"
    """Where checkpoints are kept; this server is its only writer."""
    checkpoint_bytes_max: Count = 64 * 1024 * MIB
    """Bytes of one checkpoint, over all of its files."""
    files_max: Count = 64
    """Files of one checkpoint, and names in one request."""
    writer_epoch_step_max: Count = 1_000_000
    """How far a writer's epoch may be above the highest that was seen of it; an epoch is one start
    of a Training server, so this many may come without one save between them."""
    staged_bytes_max: Count = 256 * 1024 * MIB
    """Bytes on disk of checkpoints that are not complete; writes beyond are RESOURCE_EXHAUSTED. One
    peer has at most `peer_share_max` of them, too, which must hold one checkpoint of
    `checkpoint_bytes_max`."""
    rank_max: Count = 256
    """Largest LoRA rank; as `training.rank_max`."""
    sweep_interval_s: Number = 60.0
    """How often expired checkpoints are reclaimed."""
    lease_s: Number = Field(30.0, ge=0.5)
    """How long an ephemeral checkpoint is held for who used it, or said that they hold it. It is
    reclaimed soon after, if its model has a newer one or is gone."""

    @model_validator(mode="after")
    def _a_share_holds_a_checkpoint(self) -> Self:
        if self.staged_bytes_max * self.peer_share_max < self.checkpoint_bytes_max:
            message = "a peer's share of it must hold one checkpoint of checkpoint_bytes_max"
            raise broken_rule("staged_bytes_max", f"{message}, {self.checkpoint_bytes_max} bytes")
        return self

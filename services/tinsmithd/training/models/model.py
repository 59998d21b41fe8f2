"""One model: what the Training server knows of it, and how that is written down."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tinsmithd.domain import BaseModelInfo, CheckpointPath, FullConfig, LoraConfig, Tuning
from tinsmithd.training.journal.records import StoredSnapshot
from tinsmithd.training.lane.lane import Lane


@dataclass(frozen=True)
class NewModel:
    """A checked request for a model; `tuning` or `path`, never both."""

    base_model: str
    tuning: Tuning | None
    path: CheckpointPath | None
    with_optimizer: bool
    user_metadata: dict[str, str]
    request_id: str
    digest: bytes


@dataclass
class Model:
    """One model.

    Attributes:
        number: Rises with every model created; orders pages.
        identity: Of the ranks that it was created on.
        from_checkpoint: Whether it began as a checkpoint.
        request_id, request_digest: Of the call that created it.
        last_request_time_s, last_used_s: When a call last came, for people and on a clock that no
            one sets.
        step_count: Optimizer steps made.
        snapshots: Of it, the older one first; two at most.
        garbage: Folders of snapshots that are to be removed.
        non_finite_since: Which call made the waiting gradients non-finite; empty while they are.
        state_message: What is being done with it, for a person.
        lane: Its calls.
    """

    model_id: str
    info: BaseModelInfo
    tuning: Tuning
    user_metadata: Mapping[str, str]
    number: int
    identity: Mapping[str, str]
    from_checkpoint: bool = False
    request_id: str = ""
    request_digest: bytes = b""
    create_time_s: float = field(default_factory=time.time)
    last_request_time_s: float = field(default_factory=time.time)
    last_used_s: float = field(default_factory=time.monotonic)
    step_count: int = 0
    snapshots: list[StoredSnapshot] = field(default_factory=list)
    garbage: list[str] = field(default_factory=list)
    trimmed_to: int = 0
    non_finite_since: str = ""
    state_message: str = ""
    lane: Lane = field(init=False)

    @property
    def created(self) -> bool:
        """True once it is written down and has its lane."""
        return "lane" in self.__dict__

    def about(self) -> dict[str, Any]:
        """What is written down when it is created."""
        full = isinstance(self.tuning, FullConfig)
        return {
            "info": dataclasses.asdict(self.info),
            "full" if full else "lora": dataclasses.asdict(self.tuning),
            "user_metadata": dict(self.user_metadata),
            "identity": dict(self.identity),
            "from_checkpoint": self.from_checkpoint,
            "request_id": self.request_id,
            "request_digest": self.request_digest.hex(),
            "create_time_s": self.create_time_s,
        }

    @classmethod
    def recalled(cls, model_id: str, number: int, about: Mapping[str, Any]) -> "Model":
        """The model of what was written down."""
        tuning: Tuning = FullConfig() if "full" in about else LoraConfig(**about["lora"])
        return cls(
            model_id,
            BaseModelInfo(**about["info"]),
            tuning,
            about["user_metadata"],
            number,
            about["identity"],
            from_checkpoint=about["from_checkpoint"],
            request_id=about["request_id"],
            request_digest=bytes.fromhex(about["request_digest"]),
            create_time_s=about["create_time_s"],
        )

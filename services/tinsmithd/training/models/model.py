"""One model: what the Training server knows of it, and how the journal keeps that."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tinsmithd import tunings
from tinsmithd.domain import DEFAULT_OWNER, BaseModelInfo, CheckpointPath, Tuning
from tinsmithd.owners import inner_id, logged_id, owner_of, public_id
from tinsmithd.training.lane import Lane


@dataclass(frozen=True)
class NewModel:
    """A checked request for a model; `tuning` or `path`, never both; empty `model_id` for any.

    `owner` is whose it is to be, who may have `models_max` models, or with 0 any number.
    """

    base_model: str
    tuning: Tuning | None
    path: CheckpointPath | None
    with_optimizer: bool
    user_metadata: dict[str, str]
    request_id: str
    digest: bytes
    model_id: str = ""
    owner: str = DEFAULT_OWNER
    models_max: int = 0

    @property
    def chosen_id(self) -> str:
        """The id that was chosen, as it is inside; empty where none was."""
        return self.model_id and inner_id(self.owner, self.model_id)


@dataclass
class Model:
    """One model. Only its own methods change it.

    Attributes:
        model_id: As it is inside, see `owners`.
        number: Rises with every model created; orders pages.
        identity: That of the ranks on which it was created.
        from_checkpoint: Whether it began as a checkpoint.
        request_id, request_digest: Those of the call that created it.
        chose_id: Whether that call chose its id.
        last_request_time_s, last_used_s: When a call last came: by the wall clock, for people, and
            by a clock that nobody sets.
        step_count: Optimizer steps made.
        non_finite_since: The call that made the pending gradients non-finite; empty while they are
            finite.
        state_message: What is being done with it, for a person.
        asleep: Its calls of before the start are not read yet, see `Recall.wake`.
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
    chose_id: bool = False
    create_time_s: float = field(default_factory=time.time)
    last_request_time_s: float = field(default_factory=time.time)
    last_used_s: float = field(default_factory=time.monotonic)
    step_count: int = 0
    non_finite_since: str = ""
    state_message: str = ""
    asleep: bool = False
    lane: Lane = field(init=False)

    @property
    def owner(self) -> str:
        """Whose it is."""
        return owner_of(self.model_id)

    @property
    def public_id(self) -> str:
        """Its id as callers say it."""
        return public_id(self.model_id)

    @property
    def log_name(self) -> str:
        """Its id as logs have it."""
        return logged_id(self.model_id)

    @property
    def created(self) -> bool:
        """True once the journal has it and it has its lane."""
        return "lane" in self.__dict__

    @property
    def is_alone(self) -> bool:
        """Whether it needs the ranks to itself."""
        return not self.tuning.is_adapter

    # --- what happens to it -------------------------------------------------------------------

    def open(self, lane: Lane) -> None:
        """It takes calls from now on."""
        self.lane = lane

    def called(self) -> None:
        """A call came."""
        self.last_request_time_s, self.last_used_s = time.time(), time.monotonic()

    def doing(self, message: str) -> None:
        """Say what is being done with it; empty for nothing special."""
        self.state_message = message

    def stepped(self) -> None:
        """An optimizer step was made."""
        self.set_state(self.step_count + 1)

    def set_state(self, step_count: int) -> None:
        """It has a state of so many steps, and no pending gradients."""
        self.step_count, self.non_finite_since = step_count, ""

    def became_non_finite(self, call: str) -> None:
        """With this call its pending gradients became non-finite, or were so before."""
        self.non_finite_since = self.non_finite_since or call

    # --- how the journal keeps it -------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What the journal keeps from its creation on."""
        return {
            "info": dataclasses.asdict(self.info),
            **self.tuning.to_document(),
            "user_metadata": dict(self.user_metadata),
            "identity": dict(self.identity),
            "from_checkpoint": self.from_checkpoint,
            "request_id": self.request_id,
            "request_digest": self.request_digest.hex(),
            "chose_id": self.chose_id,
            "create_time_s": self.create_time_s,
        }

    @classmethod
    def recalled(
        cls,
        model_id: str,
        number: int,
        about: Mapping[str, Any],
        last_request_time_s: float | None = None,
    ) -> "Model":
        """The model that the journal kept.

        Args:
            model_id: Its id.
            number: Its number.
            about: See `about`.
            last_request_time_s: When a call last came; None where none did.
        """
        return cls(
            model_id,
            BaseModelInfo(**about["info"]),
            tunings.from_document(about),
            about["user_metadata"],
            number,
            about["identity"],
            from_checkpoint=about["from_checkpoint"],
            request_id=about["request_id"],
            request_digest=bytes.fromhex(about["request_digest"]),
            chose_id=about.get("chose_id", False),  # not in journals of before it could be chosen
            create_time_s=about["create_time_s"],
            last_request_time_s=last_request_time_s or about["create_time_s"],
        )

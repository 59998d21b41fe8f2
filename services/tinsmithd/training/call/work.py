"""What a call on a model asks for: plain values that the journal can keep.

Data stay the bytes that came over the wire; nothing here parses them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tinsmithd.domain import AdamParams, CheckpointPath
from tinsmithd.errors import TinsmithError
from tinsmithd.saves import SaveOptions
from tinsmithd.training.call.answer import CallKind


@dataclass(frozen=True)
class ComputeWork:
    """Forward, or forward and backward.

    Attributes:
        loss: The loss, in the bytes of the wire.
        data: One entry per datum, in the bytes of the wire.
        lengths: Tokens of each datum.
        backward: Whether gradients are added.
    """

    kind: ClassVar[str] = "compute"

    loss: bytes
    data: Sequence[bytes]
    lengths: Sequence[int]
    backward: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return sum(map(len, self.data))


@dataclass(frozen=True)
class StepWork:
    """One optimizer step."""

    kind: ClassVar[str] = "optim_step"

    adam: AdamParams


@dataclass(frozen=True)
class SaveWork:
    """Save the model as a checkpoint."""

    kind: ClassVar[str] = "save"

    options: SaveOptions


@dataclass(frozen=True)
class LoadWork:
    """Replace the model's state by that of a checkpoint."""

    kind: ClassVar[str] = "load"

    path: CheckpointPath
    optimizer: bool


@dataclass(frozen=True)
class RefusedWork:
    """A call that is wrong: it only uses its number."""

    kind: ClassVar[str] = "refused"

    error: TinsmithError


Work = ComputeWork | StepWork | SaveWork | LoadWork | RefusedWork


def kind_of(work: Work) -> CallKind | None:
    """The kind of a call; a refused one is answered with an error, whatever it was."""
    match work:
        case ComputeWork():
            return CallKind.FORWARD_BACKWARD if work.backward else CallKind.FORWARD
        case StepWork():
            return CallKind.OPTIM_STEP
        case SaveWork():
            return CallKind.SAVE_CHECKPOINT
        case LoadWork():
            return CallKind.LOAD_CHECKPOINT
        case RefusedWork():
            return None


def changes_model(work: Work) -> bool:
    """Whether the ranks hold another state after this work than before it."""
    return isinstance(work, StepWork | LoadWork) or (
        isinstance(work, ComputeWork) and work.backward
    )

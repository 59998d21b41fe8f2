"""What the Training server asks of a rank group. `link.RankGroup` is the one over gRPC."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tinsmithd.domain import AdamParams, BaseModelInfo, Tuning
from tinsmithd.training.call.work import ComputeWork

OnResult = Callable[[bytes], None]
"""Takes the outputs of the next datum, in datum order and in the form that callers get."""

OnPiece = Callable[[str, bytes], Awaitable[None]]
"""Takes the next bytes of a state file: file name and data."""


Pieces = Sequence[tuple[str, bytes]]
"""All state files of a model, in the same form."""


class CallPart(Enum):
    """Which part of a call that adds gradients a `compute` is.

    Where a part fails the ranks take back what the parts before it added.
    """

    WHOLE = "whole"
    FIRST = "first"
    LATER = "later"


@dataclass(frozen=True)
class StateInfo:
    """What a state that went out or came in was."""

    tuning: Tuning
    step_count: int


@dataclass(frozen=True)
class Computed:
    """What a compute gave, besides the outputs.

    Attributes:
        metrics: By `name:reduction`.
        plan: The composition in which it was computed; the same again gives the same bits.
        non_finite: The gradients that wait now are not all finite.
        engine_s: Seconds that the engine took.
    """

    metrics: Mapping[str, float]
    plan: bytes = b""
    non_finite: bool = False
    engine_s: float = 0.0


class Trainer(Protocol):
    """One rank group. It does one thing at a time; whoever calls sees to that.

    Every method may raise `TrainerLost`: the group is gone, with every model it held.
    """

    @property
    def info(self) -> BaseModelInfo:
        """The base model that the group holds."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def engine(self) -> str:
        """Name of the engine."""

    @property
    def identity(self) -> Mapping[str, str]:
        """All that the last bit of a result depends on, besides commands and plans."""

    async def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model; one that trains all weights must be alone."""

    async def delete_model(self, model_id: str) -> None:
        """Drop a model; an unknown one is no error."""

    async def compute(
        self,
        model_id: str,
        work: ComputeWork,
        *,
        part: CallPart,
        plan: bytes,
        on_result: OnResult,
    ) -> Computed:
        """Forward, and backward too where asked; an empty plan leaves the composition open."""

    async def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply the waiting gradients; returns the metrics."""

    async def snapshot(
        self, model_id: str, *, optimizer: bool, on_piece: OnPiece
    ) -> Awaitable[StateInfo]:
        """Copy the model's state; other calls may follow at once.

        Returns:
            What sends the copy's files to `on_piece`; it may fail as any other method, but is to
            blame for no loss of the group.
        """

    async def import_state(
        self,
        model_id: str,
        pieces: Pieces,
        *,
        optimizer: bool,
        create: bool,
        said: StateInfo | None,
    ) -> StateInfo:
        """Replace the model's state, or create the model from it.

        Args:
            model_id: Which model.
            pieces: The state.
            optimizer: Whether its optimizer state counts, too.
            create: The model is not there yet.
            said: What a checkpoint is said to hold: its files must say so, too. None for a snapshot
                that ranks made, which is not checked for what its values became.

        Raises:
            DataLoss: The files are not what they have to be (CHECKPOINT_CORRUPT).
            FailedPrecondition: They do not fit the model (INCOMPATIBLE_CHECKPOINT).
        """


class TrainerLost(Exception):
    """The rank group is gone, with every model it held.

    Attributes:
        blamed: It may be for what it was asked to do: nobody else ended it.
    """

    def __init__(self, message: str, *, blamed: bool = False) -> None:
        super().__init__(message)
        self.blamed = blamed


class ModelBroken(Exception):
    """The engine failed half-way through a call; this one model must not be used any more."""

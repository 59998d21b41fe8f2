"""What the Training server asks of a rank group; `rank_group` speaks it over gRPC."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tinsmithd.domain import AdamParams, BaseModelInfo, Tuning
from tinsmithd.mismatch import Mismatch
from tinsmithd.sizes import Work
from tinsmithd.training.call import BatchPlace, ComputeWork

OnOutput = Callable[[bytes], None]
"""Takes the output of the next datum, in datum order and in the form that callers get."""

OnPiece = Callable[[str, bytes], Awaitable[None]]
"""Takes the next bytes of a state file: file name and data."""

Pieces = Sequence[tuple[str, bytes]]
"""All state files of a model, in the same form."""


@dataclass(frozen=True)
class StateInfo:
    """What a state is that leaves the ranks or comes to them.

    Attributes:
        deposited: Bytes of each file that was left in the deposit; empty where all were sent.
    """

    tuning: Tuning
    step_count: int
    deposited: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Computed:
    """What a batch gave, besides its outputs.

    Attributes:
        metrics: By `name:reduction`.
        composition: The engine's; the same composition gives the same bits again.
        non_finite: Whether some of the pending gradients are not finite.
        engine_s: Seconds that the engine took.
        mismatch: Of a loss that is given sampling logprobs; else None.
    """

    metrics: Mapping[str, float]
    composition: bytes = b""
    non_finite: bool = False
    engine_s: float = 0.0
    mismatch: Mismatch | None = None


@dataclass(frozen=True)
class RankMemory:
    """What a rank says that it has of memory; 0 where it does not know.

    Attributes:
        resident_bytes: Of the machine's.
        device_bytes, device_size_bytes: Of its device's, and all that this has.
    """

    resident_bytes: int
    device_bytes: int
    device_size_bytes: int


@dataclass(frozen=True)
class Vitals:
    """How a rank group is.

    Attributes:
        silence_s: Since it last said anything.
        command_s: Since it was given the oldest command that it has not finished; 0: it has none.
        memory: Of its ranks, as far as they said so.
    """

    silence_s: float
    command_s: float
    memory: Mapping[int, RankMemory]


class RankGroup(Protocol):
    """One rank group. It does one thing at a time; whoever calls sees to that.

    Every method may raise `RankGroupLost`: the group is gone, with every model it held.
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
        """All that the last bit of a result depends on, besides commands and compositions."""

    @property
    def work(self) -> Work:
        """What a token costs, as far as the group says."""

    @property
    def vitals(self) -> Vitals:
        """How it is now; another thread may ask."""

    async def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model; one that trains all weights must be alone."""

    async def delete_model(self, model_id: str) -> None:
        """Drop a model; an unknown one is no error."""

    async def compute(
        self,
        model_id: str,
        batch: ComputeWork,
        *,
        place: BatchPlace,
        composition: bytes,
        on_output: OnOutput,
    ) -> Computed:
        """Forward, and backward too where asked; with no composition the engine chooses one."""

    async def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply the pending gradients; returns the metrics."""

    async def copy_state(
        self, model_id: str, *, optimizer: bool, on_piece: OnPiece, deposit: str = ""
    ) -> Awaitable[StateInfo]:
        """Copy the model's state; other calls may follow at once.

        Args:
            model_id: Which model.
            optimizer: Whether with its optimizer state.
            on_piece: Takes the files.
            deposit: The folder in which they may be left instead; empty: there is none.

        Returns:
            What sends the copy's files, or leaves them. It may fail as any other method, but is to
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
            create: Whether the model has to be created.
            said: What a checkpoint claims to hold: its files must say so, too. None for a snapshot:
                ranks made it, and nobody checks what its values became.

        Raises:
            DataLoss: The files are not what they have to be (CHECKPOINT_CORRUPT).
            FailedPrecondition: They do not fit the model (INCOMPATIBLE_CHECKPOINT).
        """


class RankGroupLost(Exception):
    """The rank group is gone, with every model it held.

    Attributes:
        blamed: Whether the command under way may be the cause: nobody else ended the group.
    """

    def __init__(self, message: str, *, blamed: bool = False) -> None:
        super().__init__(message)
        self.blamed = blamed


class ModelBroken(Exception):
    """The engine failed half-way through a call; this one model must not be used any more.

    Attributes:
        blamed: Always true: only the command under way can be the cause.
    """

    blamed = True

"""What a lane needs of its model: somebody who carries out its calls, in the lane's order."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tinsmithd.errors import TinsmithError
from tinsmithd.training.call import Work
from tinsmithd.training.journal import Write
from tinsmithd.training.ranks import OnOutput

TakeTurn = Callable[[int], contextlib.AbstractAsyncContextManager[None]]
"""A turn at the ranks that costs so many tokens; entering raises when the lane was closed."""


@dataclass(frozen=True)
class Effect:
    """What carrying out a call changed.

    Attributes:
        value: The answer, without its outputs.
        error: The answer, where it is an error that changed the model.
        composition: How to make the same change again; empty where there is nothing to make.
        writes: What becomes true together with the answer.
        engine_s: Seconds that the ranks computed; not part of the answer.
    """

    value: Mapping[str, Any] = field(default_factory=dict)
    error: TinsmithError | None = None
    composition: bytes = b""
    writes: Sequence[Write] = ()
    engine_s: float = 0.0


class CallExecutor(Protocol):
    """Carries out the calls of one model, and counts what the journal holds of them."""

    def check_room(self, nbytes: int) -> None:
        """Refuse a new call of this size when the journal has no room for it.

        Raises:
            ResourceExhausted: See above.
        """

    def wrote(self, position: int, nbytes: int) -> None:
        """The journal was given a call of this size."""

    def forgot(self, positions: Sequence[int]) -> None:
        """Calls at these positions were taken back, or are never made again."""

    async def execute(
        self, position: int, seq_id: int, work: Work, on_output: OnOutput, turn: TakeTurn
    ) -> Effect:
        """Carry a call out on the ranks.

        Raises:
            Unavailable, ResourceExhausted: Nothing happened, the number is free again.
            TinsmithError: It is refused, and has no effect but what the error says.
            RankGroupLost, ModelBroken: Nobody knows what happened.
        """

    async def restore(self, turn: TakeTurn) -> None:
        """Wait for ranks and bring the model to the state after the last recorded call.

        Raises:
            DataLoss: Nobody has that state any more.
            RankGroupLost, ModelBroken: The ranks died, or could not hold it.
        """

    @property
    def has_gradients(self) -> bool:
        """Whether the model has pending gradients."""

    async def suspend(self, turn: TakeTurn) -> None:
        """Take the model off the ranks; `restore` brings it back.

        Raises:
            TinsmithError, RankGroupLost, ModelBroken: The ranks may still hold it.
        """

    async def rest(self, turn: TakeTurn) -> None:
        """No call came for `snapshot_idle_s`: make the model's return short.

        Raises:
            RankGroupLost: The ranks died.
        """

    def left(self) -> None:
        """The model is not at the ranks any more, and another may have its seat."""

    async def forget(self) -> None:
        """The model is deleted and its lane has ended: leave nothing of it."""

    async def settled(self, position: int, work: Work, turn: TakeTurn) -> None:
        """A call was carried out; the next one waits until this returns."""

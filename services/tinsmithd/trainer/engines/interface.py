"""What a training engine is. Two implementations: `engines.reference` and `engines.deepspeed`.

Every rank of a group calls its engine in the same order with the same arguments (SPMD). The engine
splits the data over the ranks itself, and every rank returns the same result, but for copies of
states, which only the first rank has. The Training server has checked the arguments against base
model and loss (shapes, dtypes, finite, vocabulary), so an engine checks only what it alone can
know.

A method takes effect wholly or not at all. An engine that cannot undo a half-made change raises
`ModelBroken`, and that model is gone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tinsmithd.domain import AdamParams, BaseModelInfo, Datum, LossFn, ModelState, Tuning
from tinsmithd.trainer.composition.rounds import CompositionMismatch as CompositionMismatch

DatumOutput = Mapping[str, np.ndarray]
"""Of one datum: `logprobs`, float32, shaped like its `target_tokens`."""

OnOutput = Callable[[int, DatumOutput], None]
"""Called once per datum with its index in the batch, in order, as soon as it is computed."""


class ModelBroken(Exception):
    """A method failed half-way and cannot be undone; the model must not be used."""


@dataclass(frozen=True)
class Batch:
    """What an engine computes in one turn.

    This value alone describes what is computed together, so no signature changes with it: data
    that share a prefix, or data of several models, would be fields of this value.

    Attributes:
        model_id: The model of all data.
        data: The data.
        loss_fn: The loss of all data.
        backward: Whether to add gradients to the model's pending ones.
        composition: The composition to compute in, which an earlier `ForwardResult` gave; empty
            lets the engine choose one.
    """

    model_id: str
    data: Sequence[Datum]
    loss_fn: LossFn
    backward: bool
    composition: bytes = b""


@dataclass(frozen=True)
class ForwardResult:
    """Result of `forward`, besides the outputs of the data.

    Attributes:
        metrics: Named `name:reduction`; `loss:sum` is always there.
        composition: The composition as it was executed. The same batch in this composition, on a
            model in the same state and an engine of equal `identity`, gives the same bits; on a GPU
            only where that says `deterministic`.
        non_finite: With `backward`, whether the model's pending gradients are no longer all
            finite, on whichever rank; else False.
    """

    metrics: Mapping[str, float]
    composition: bytes
    non_finite: bool = False


class TrainingEngine(Protocol):
    """Holds one base model and its models of one tuning: weights, gradients, optimizer state.

    A model that is no adapter changes the base itself and is alone, see `registry.Engines`.
    """

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""

    @property
    def identity(self) -> Mapping[str, str]:
        """All that the last bit of a result depends on, besides calls and their compositions."""

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model without optimizer state.

        An adapter begins with A drawn from its seed and B zero; a model that is no adapter begins
        with the weights of the base as it was loaded.

        Raises:
            ValueError: The id is taken.
            InvalidArgument: The base has no layers that the tuning asks for, or this engine cannot
                adapt them; the field names them.
        """

    def delete_model(self, model_id: str) -> None:
        """Drop a model and free what it held. An unknown id is no error."""

    def forward(self, batch: Batch, on_output: OnOutput) -> ForwardResult:
        """Compute the summed loss and, with `backward`, add its gradients to the pending ones.

        Args:
            batch: What to compute.
            on_output: Takes the outputs.

        Raises:
            CompositionMismatch: The composition is not one of this batch.
            ResourceExhausted: Memory does not suffice for a datum alone or for a micro-batch of the
                given composition, which an engine never changes (OUT_OF_MEMORY).
        """

    def savepoint(self, model_id: str) -> None:
        """Remember the pending gradients for `rollback`; what was remembered before is dropped."""

    def rollback(self, model_id: str) -> None:
        """Put the pending gradients back to the `savepoint`, and forget it."""

    def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply one AdamW step with the pending gradients and clear them.

        Where none are pending they count as zero (momentum and decay still act).

        Returns:
            `grad_norm:last`, the global L2 norm before clipping, and `step:last`.

        Raises:
            ModelBroken: It failed half-way.
            FailedPrecondition: A gradient is not finite (NON_FINITE_GRADIENT). The gradients are
                cleared, weights and optimizer state are as before.
        """

    def export_state(self, model_id: str, *, optimizer: bool) -> ModelState:
        """Copy a model's state, with or without its optimizer state; no later call changes it.

        Ranks but the first give it their shares, and get a state without arrays.
        """

    def import_state(self, model_id: str, state: ModelState, *, optimizer: bool) -> None:
        """Replace a model's weights by `state`'s and drop its pending gradients.

        With `optimizer` it takes over moments and step count, else they start from zero.

        Raises:
            FailedPrecondition: Rank, targets or shapes differ from the model's
                (INCOMPATIBLE_CHECKPOINT); the model is as before.
        """

    def close(self) -> None:
        """Free what it holds; it is not used any more."""

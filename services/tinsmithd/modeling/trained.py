"""The trained weights of models on a base model: one interface for all tunings."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.modeling.logits import float_logits
from tinsmithd.tunings import Tuning


@dataclass(frozen=True)
class HeadLayer:
    """The layer that makes logits.

    Attributes:
        module: The linear layer of the base model, `(V, d)`.
        lora_a: float32 `(r, d)`, or None where the adapter leaves the head alone.
        lora_b: float32 `(V, r)`, likewise.
        scaling: alpha / rank.
        trained: Whether its own weight is trained.
    """

    module: torch.nn.Linear
    lora_a: torch.nn.Parameter | None = None
    lora_b: torch.nn.Parameter | None = None
    scaling: float = 1.0
    trained: bool = False

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 `(T, V)` of hidden states `(T, d)`, without a graph."""
        return float_logits(hidden, self.module.weight, self.lora_a, self.lora_b, self.scaling)


class TrainedWeights(ABC):
    """The weights on one base model that engines train, apart by key; float32."""

    @abstractmethod
    def tuning(self, key: str) -> Tuning:
        """The tuning of a key."""

    @abstractmethod
    def add(self, key: str, tuning: Tuning) -> None:
        """Add weights with their first values.

        Raises:
            ValueError: The key is taken, or the tuning is another one.
            InvalidArgument: The base model has no layers of a kind that the tuning asks for; the
                field names it.
        """

    @abstractmethod
    def remove(self, key: str) -> None:
        """Drop the weights of a key; an unknown one is no error."""

    @staticmethod
    @abstractmethod
    def first_values(
        shapes: Mapping[str, Sequence[int]], tuning: Tuning
    ) -> dict[str, np.ndarray] | None:
        """The first values of weights; None where they are those of the base model.

        Args:
            shapes: Shapes of the parameters, by their sorted names.
            tuning: The tuning of the weights.
        """

    @abstractmethod
    def active(self, key: str | None) -> AbstractContextManager[Any]:
        """The causal language model with the weights of a key, or with those of the base alone.

        Raises:
            KeyError: There is no such key.
        """

    @abstractmethod
    def head(self, key: str | None) -> HeadLayer:
        """The layer that makes logits under the weights of a key."""

    @abstractmethod
    def parameters(self, key: str) -> dict[str, torch.nn.Parameter]:
        """The parameters of a key, by their names in checkpoints, sorted."""

    @abstractmethod
    def config(self, key: str) -> dict[str, Any]:
        """The content of a checkpoint's configuration file."""

    def files(self, key: str) -> dict[str, bytes]:
        """The files that a checkpoint holds besides, by name."""
        return {}

    def export_weights(self, key: str) -> dict[str, np.ndarray]:
        """Copy the weights out, float32, by their names in checkpoints."""
        return {
            name: parameter.detach().float().cpu().numpy().copy()
            for name, parameter in self.parameters(key).items()
        }

    def import_weights(self, key: str, weights: Mapping[str, np.ndarray]) -> None:
        """Replace the weights.

        Raises:
            FailedPrecondition: Names or shapes differ (INCOMPATIBLE_CHECKPOINT); the weights are
                as before.
        """
        parameters = self.parameters(key)
        check_same_shape({name: tuple(p.shape) for name, p in parameters.items()}, weights)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.tensor(np.asarray(weights[name], dtype=np.float32)))


def check_same_shape(shapes: Mapping[str, Sequence[int]], arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays that are not one for each parameter, of its shape.

    Args:
        shapes: Shapes of the parameters, by name.
        arrays: Arrays, by name.

    Raises:
        FailedPrecondition: See above (INCOMPATIBLE_CHECKPOINT).
    """
    for name in sorted(shapes.keys() | arrays.keys()):
        ours = list(shapes[name]) if name in shapes else None
        theirs = list(arrays[name].shape) if name in arrays else None
        if ours != theirs:
            message = f"the checkpoint has {name} of shape {theirs}, this model {ours}"
            raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)

"""`forward_backward_custom`: any differentiable function of logprobs, computed in the client.

Forward gives the logprobs; the user's function and torch give the gradient dC/dlogprobs; and a
cross-entropy with weights -dC/dlogprobs has exactly that gradient, since its loss is
-sum(weights * logprobs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinsmith.errors import InvalidArgumentError
from tinsmith.types.inputs import Datum, check_datum
from tinsmith.types.tensor import TensorData, from_any

if TYPE_CHECKING:
    import torch

CustomLossFn = Callable[[list[Datum], list[Any]], Any]
"""Takes the data and the logprobs of each, torch, float32 `(N,)` or `(N, K)`; returns the scalar
loss and a mapping of metrics."""


class LogprobList(list["torch.Tensor"]):
    """The logprobs of each datum, as a list; used as one tensor, it is all of them, flat.

    `logprobs[3]` is the fourth datum's, `torch.cat(logprobs)` works, and so do `logprobs ** 2`,
    `-logprobs` and `logprobs.sum()`.
    """

    def flat(self) -> torch.Tensor:
        """All logprobs, `(sum of sizes,)`."""
        import torch

        return torch.cat([logprobs.reshape(-1) for logprobs in self])

    def __pow__(self, other: Any) -> Any:
        return self.flat() ** other

    def __sub__(self, other: Any) -> Any:
        return self.flat() - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.flat()

    def __truediv__(self, other: Any) -> Any:
        return self.flat() / other

    def __neg__(self) -> Any:
        return -self.flat()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.flat(), name)


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """Make the data of the first call: only what cross-entropy reads.

    Raises:
        InvalidArgumentError: One is no Datum or has no `target_tokens`.
    """
    prepared = []
    for index, datum in enumerate(data):
        check_datum(datum, index)
        targets = datum.loss_fn_inputs.get("target_tokens")
        if targets is None:
            where = f'data[{index}].loss_fn_inputs["target_tokens"]'
            raise InvalidArgumentError(f"{where}: is missing", field=where, reason="MISSING_FIELD")
        targets = from_any("target_tokens", targets)
        weights = datum.loss_fn_inputs.get("weights")
        if weights is None:
            weights = TensorData(np.zeros(targets.shape, np.float32))
        inputs = {"target_tokens": targets, "weights": weights}
        prepared.append(Datum(datum.model_input, inputs))
    return prepared


def run_loss(
    loss_fn: CustomLossFn, data: list[Datum], logprobs: Sequence[np.ndarray]
) -> tuple[float, dict[str, float], list[np.ndarray]]:
    """Call the user's function and differentiate it.

    Returns:
        The loss, the user's metrics, and dC/dlogprobs for each datum, zero where it has none.

    Raises:
        InvalidArgumentError: The function returned no differentiable scalar.
    """
    import torch

    leaves = LogprobList(torch.from_numpy(np.array(array)).requires_grad_() for array in logprobs)
    returned = loss_fn(data, leaves)
    try:
        loss, metrics = returned
    except (TypeError, ValueError):
        message = "loss_fn: must return (loss, metrics)"
        raise InvalidArgumentError(message, field="loss_fn") from None
    if not isinstance(metrics, Mapping):
        message = f"loss_fn: the metrics must be a mapping, got {type(metrics).__name__}"
        raise InvalidArgumentError(message, field="loss_fn")
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        message = "loss_fn: the loss must be a scalar tensor that depends on the logprobs"
        raise InvalidArgumentError(message, field="loss_fn")
    loss.reshape(()).backward()  # type: ignore[no-untyped-call]
    gradients = [
        np.zeros(leaf.shape, np.float32) if leaf.grad is None else leaf.grad.numpy()
        for leaf in leaves
    ]
    return float(loss.detach()), {name: float(v) for name, v in metrics.items()}, gradients


def backward_data(data: Sequence[Datum], gradients: Sequence[np.ndarray]) -> list[Datum]:
    """Make the data of the second call: cross-entropy with weights -dC/dlogprobs."""
    return [
        Datum(
            datum.model_input,
            {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": TensorData(-gradient),
            },
        )
        for datum, gradient in zip(data, gradients, strict=True)
    ]


def metrics_of(
    loss: float, metrics: Mapping[str, float], surrogate: Mapping[str, float]
) -> dict[str, float]:
    """The server's metrics with the custom loss instead of its own, and the user's."""
    own = {"loss:sum": loss, "surrogate_loss:sum": surrogate["loss:sum"]}
    return {**surrogate, **own, **metrics}

"""Gradients that wait for a step."""

import math

import pytest
import torch

from tinsmithd.modeling.device_copies import host_copy
from tinsmithd.trainer.engines.deepspeed.gradients import Layout, PendingGradients


def waiting(*values: float) -> PendingGradients:
    gradients = PendingGradients()
    gradients.buffer(1000, None)[: len(values)] = torch.tensor(values)
    return gradients


@pytest.mark.parametrize(
    "values",
    [
        (),
        (1.0, -2.0),
        (3e38,) * 9,
        (-3e38,) * 9,
        (3e38, 3e38, -3e38, -3e38),
        (0.0, -0.0, 1e-45),
    ],
)
def test_finite_elements_are_finite_whatever_their_sum_is(values: tuple[float, ...]) -> None:
    """Also where a float32 sum of them overflows."""
    assert waiting(*values).all_finite()


@pytest.mark.parametrize(
    "values",
    [
        (1.0, math.nan),
        (math.inf, 1.0),
        (-math.inf,),
        (math.inf, -math.inf),
        (3e38, 3e38, math.nan),
        (3e38, 3e38, -math.inf),
    ],
)
def test_one_element_that_is_not_is_found(values: tuple[float, ...]) -> None:
    """Infinities do not cancel, and NaN is not lost among large ones."""
    assert not waiting(*values).all_finite()


def test_nothing_that_waits_is_finite() -> None:
    """And after a step or a way back it is as before."""
    gradients = PendingGradients()
    assert gradients.all_finite()
    gradients.save()
    gradients.buffer(4, None)[0] = math.inf
    assert not gradients.all_finite()
    gradients.roll_back()
    assert gradients.all_finite()


def test_arrays_look_into_one_copy() -> None:
    """Parameters by name, of their shapes, out of a buffer that nothing else changes."""
    layout = Layout({"a": torch.empty(2, 3), "b": torch.empty(4)})
    flat = torch.arange(12, dtype=torch.float32)
    arrays = layout.by_name(host_copy(flat[: layout.count]))
    flat.zero_()
    assert arrays["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["b"].tolist() == [6, 7, 8, 9]

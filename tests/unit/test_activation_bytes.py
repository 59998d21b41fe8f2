"""Measuring what a token keeps for the backward pass."""

import weakref

import torch

from tinsmithd.trainer.compute.memory import activation_bytes_per_token


def test_each_saved_byte_counts_once_and_none_is_kept() -> None:
    """An operation that saves its own output holds no graph once all is counted."""
    made: list[weakref.ref[torch.Tensor]] = []
    weight = torch.ones(8, requires_grad=True)

    def run(count: int) -> torch.Tensor:
        grown = torch.ones(count, 8) * weight  # saves its first factor
        output = grown.exp()  # saves its output
        made.extend([weakref.ref(grown), weakref.ref(output)])
        return output.exp() + output.sin()  # saves its output; saves its input, once more

    assert activation_bytes_per_token(run) == 3 * 8 * 4
    assert [ref() for ref in made] == [None] * len(made)

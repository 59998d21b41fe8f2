"""Mends how vLLM scores prompts beside adapters; runs in vLLM's own processes.

vLLM 0.32 makes the logits of a prompt's positions with the rows of the batch that is sampled: where
an adapter is in the batch, the head's part of it meets as many rows as there are sequences, not
positions. With one sequence that is right, with more the engine dies (CPU) or may take another
adapter's head. Here the prompts of a step are scored one after the other, each with the head of its
own adapter.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA


def mend(runner: Any) -> None:
    """Replace a method of a model runner by one that asks the former once per prompt.

    Raises:
        AttributeError: This release of vLLM is not built as 0.32 is.
    """
    heads = [m for m in runner.model.modules() if isinstance(m, LogitsProcessorWithLoRA)]
    together = runner._get_prompt_logprobs_dict
    manager = runner.lora_manager._adapter_manager

    def one_by_one(
        hidden_states: torch.Tensor, num_scheduled_tokens: Mapping[str, int]
    ) -> dict[str, Any]:
        waiting = runner.num_prompt_logprobs
        found: dict[str, Any] = {}
        for name in list(waiting):
            lora = runner.requests[name].lora_request
            slot = None
            if lora is not None and name in num_scheduled_tokens:
                slot = manager.lora_index_to_id.index(lora.lora_int_id)
            runner.num_prompt_logprobs = {name: waiting[name]}
            with _head_of(heads, slot):
                found |= together(hidden_states, num_scheduled_tokens)
            if not runner.num_prompt_logprobs:
                del waiting[name]
        runner.num_prompt_logprobs = waiting
        return found

    runner._get_prompt_logprobs_dict = one_by_one


@dataclass(frozen=True)
class _OneAdapter:
    """Stands for vLLM's products of a batch with its adapters, where all rows have the same one."""

    slot: int | None

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Add to logits `y` `(T, V)` what the adapter makes of `x` `(T, d)`."""
        if self.slot is not None:
            shrunk = x.float() @ lora_a_stacked[self.slot, 0].float().T
            y += (scale * shrunk @ lora_b_stacked[self.slot, 0].float().T).to(y.dtype)
        return y


@contextlib.contextmanager
def _head_of(heads: list[Any], slot: int | None) -> Iterator[None]:
    before = [head.punica_wrapper for head in heads]
    for head in heads:
        head.punica_wrapper = _OneAdapter(slot)
    try:
        yield
    finally:
        for head, wrapper in zip(heads, before, strict=True):
            head.punica_wrapper = wrapper

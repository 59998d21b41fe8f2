"""Makes what the engine computes with: the compiled part where it can be had, else torch alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from tinsmithd.modeling.base import BaseModel
from tinsmithd.sampler.engines.transformers.kv import KvCache, StepAttention
from tinsmithd.sampler.engines.transformers.model.build import build
from tinsmithd.sampler.engines.transformers.model.check import GAP_MAX, Expected
from tinsmithd.sampler.engines.transformers.model.linear import RowRule
from tinsmithd.sampler.engines.transformers.model.lora_layout import LoraLayout
from tinsmithd.sampler.engines.transformers.model.lora_pool import LoraPool
from tinsmithd.sampler.engines.transformers.model.lora_rows import LoraRows
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape
from tinsmithd.sampler.engines.transformers.native import (
    NativeDecoder,
    NativeModel,
    NativeWorkspace,
    load_library,
)
from tinsmithd.sampler.engines.transformers.sampling import Workspace

CHECK_PROMPT_TOKENS = 12
"""Of the check's tokens those that are read at once; the others come one by one."""

OnProgress = Callable[[str], None]

NativeUse = Literal["exact", "always", "never"]
"""When to compute with compiled kernels; see `start`."""


class AnyDecoder(Protocol):
    """What computes steps; see `Decoder`."""

    @property
    def shape(self) -> ModelShape:
        """Of the model."""

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: StepAttention,
        loras: LoraRows | None,
        *,
        sequences: int = 0,
    ) -> Tensor:
        """The hidden states of rows, `(T, hidden)`."""

    def logits(self, hidden_N: Tensor, loras: LoraRows | None) -> Tensor:
        """Logits for scores, float32 `(N, vocab)`."""

    def draw_logits(self, hidden_N: Tensor, loras: LoraRows | None) -> Tensor:
        """Logits for draws."""


@dataclass(frozen=True)
class Started:
    """What `start` makes.

    Attributes:
        decoder: The arithmetic.
        pool: Its adapters, none yet.
        rows_apart: Whether the bits of a row do not depend on the rows beside it.
        workspace: Makes memory for draws.
        close: Ends its threads, once nothing computes any more.
    """

    decoder: AnyDecoder
    pool: LoraPool
    rows_apart: bool
    workspace: Callable[[], Workspace]
    close: Callable[[], None]


def start(
    base: BaseModel,
    *,
    rows_max: int,
    keep_rows_apart: bool,
    native: NativeUse,
    native_folder: str,
    on_progress: OnProgress,
) -> Started:
    """Make a decoder of a base model, whose own layers lose their weights.

    Args:
        base: See `build`.
        rows_max: See `build`.
        keep_rows_apart: See `build`.
        native: Whether to use the compiled part, where it can be had and computes what transformers
            does: never, or else. It is exact in float32, and rounds as a trainer does in bfloat16,
            so "exact" and "always" are the same.
        native_folder: Where it is kept; see `load_library`.
        on_progress: Takes a line for a person now and then.

    Raises:
        NotFound: See `build`.
    """
    made = None if native == "never" else _native_of(base, native_folder, on_progress)
    if made is not None:
        layout = LoraLayout.of(base.model)
        _drop_weights(base.model)
        pool = LoraPool(layout, made.shape, RowRule(), made.kernels.turn, as_floats=True)
        return _with_native(made, pool)
    built = build(base, rows_max=rows_max, keep_rows_apart=keep_rows_apart, on_progress=on_progress)
    return Started(built.decoder, built.pool, built.rows_apart, Workspace, _nothing)


def _with_native(made: NativeModel, pool: LoraPool) -> Started:
    def workspace() -> Workspace:
        return NativeWorkspace(made.kernels)

    return Started(NativeDecoder(made), pool, True, workspace, made.kernels.close)


def _native_of(base: BaseModel, folder: str, on_progress: OnProgress) -> NativeModel | None:
    """The compiled part's copy of a model, once it was seen to compute the same."""
    if not NativeModel.can_take(base.model):
        return None
    library = load_library(folder, torch.get_num_threads(), on_progress=on_progress)
    if library is None:
        return None
    made = NativeModel(library, base.model)
    gap = gap_to(Expected(base.model), NativeDecoder(made))
    if gap <= GAP_MAX[made.shape.dtype]:
        on_progress("computing with compiled kernels")
        return made
    library.close()
    on_progress(
        f"compiled kernels differ from transformers by {gap:.2g} nats in the mean: not used"
    )
    return None


@torch.inference_mode()
def gap_to(expected: Expected, decoder: AnyDecoder) -> float:
    """The mean gap of a decoder's logprobs to those of transformers, in nats.

    Some tokens are read at once, and the others follow one by one, as those that are sampled do.
    """
    tokens = expected.tokens
    count, first = len(tokens), CHECK_PROMPT_TOKENS
    cache = KvCache(decoder.shape, bytes_max=1 << 40, prefix_bytes_max=0, chunk_tokens=count)
    room = cache.reserve(first, count - first, 1)
    assert room is not None
    prompt = cache.open_prompt(room, "", np.asarray(tokens[:first]))
    step = cache.batch([], [(prompt, 0, first)])
    found = [decoder.forward(tokens[:first], step.positions_T, step, None)]
    step.commit()
    (sequence,) = cache.fork(prompt)
    for place in range(first, count):
        step = cache.batch([sequence], [])
        here = tokens[place : place + 1]
        found.append(decoder.forward(here, step.positions_T, step, None, sequences=1))
        step.commit()
    logprobs = decoder.draw_logits(torch.cat(found), None).log_softmax(-1)
    return float((logprobs - expected.logprobs).abs().mean())


def _drop_weights(model: torch.nn.Module) -> None:
    """Give back the memory of all linear layers; the embedding has an owner of its own."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight = torch.nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def _nothing() -> None:
    """There are no threads."""

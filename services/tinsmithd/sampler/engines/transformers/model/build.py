"""Makes of a loaded base model what the Sampler computes with, and checks it."""

from collections.abc import Callable
from dataclasses import dataclass

from tinsmithd.modeling.base import BaseModel
from tinsmithd.sampler.engines.transformers.model.check import Expected
from tinsmithd.sampler.engines.transformers.model.decoder import Decoder
from tinsmithd.sampler.engines.transformers.model.invariance import decide_rule
from tinsmithd.sampler.engines.transformers.model.linear import RowRule
from tinsmithd.sampler.engines.transformers.model.lora_layout import LoraLayout
from tinsmithd.sampler.engines.transformers.model.lora_pool import LoraPool


@dataclass(frozen=True)
class Built:
    """What `build` makes.

    Attributes:
        decoder: The arithmetic.
        pool: Its adapters, none yet.
        rows_apart: Whether the bits of a row do not depend on the rows beside it.
    """

    decoder: Decoder
    pool: LoraPool
    rows_apart: bool


def build(
    base: BaseModel,
    *,
    rows_max: int,
    keep_rows_apart: bool,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Built:
    """Make a decoder of a base model, whose own layers lose their weights.

    Args:
        base: Nothing can be computed with its model afterwards; the rest of it stays.
        rows_max: Maximum rows of one forward.
        keep_rows_apart: Compute in blocks where products depend on how many rows there are.
        on_progress: Takes a line for a person now and then.

    Raises:
        NotFound: The decoder computes something else than transformers (BASE_MODEL_NOT_FOUND).
    """
    layout, expected = LoraLayout.of(base.model), Expected(base.model)
    rule = RowRule()
    decoder = Decoder(base.model, rule)
    apart = decide_rule(decoder, layout, rows_max, keep_rows_apart)
    if not apart:
        on_progress("the bits of a row depend on how many rows there are")
    elif rule.few[-1] < rows_max:
        on_progress(f"computing in blocks of {rule.few[-1]} rows, so that their bits are their own")
    expected.check(base.info.name, decoder)
    return Built(decoder, LoraPool(layout, decoder.shape, rule), apart)

"""Makes a training engine by name."""

from collections.abc import Callable

from tinsmithd.modeling.base import load_base
from tinsmithd.trainer.engines.interface import TrainingEngine


def make_engine(
    name: str,
    base_model: str,
    *,
    dtype: str,
    zero_stage: int,
    micro_batch_tokens_max: int = 2048,
    on_progress: Callable[[str], None],
) -> TrainingEngine:
    """Load a base model into an engine.

    Args:
        name: "deepspeed" or "reference".
        base_model: Hugging Face name or folder.
        dtype: "float32" or "bfloat16".
        zero_stage: 1 to 3; the reference engine has none.
        micro_batch_tokens_max: Tokens computed together; the reference engine takes one datum.
        on_progress: Takes a line for a person now and then.

    Raises:
        NotFound: See `load_base`.
        ValueError: There is no such engine.
    """
    if name == "reference":
        from tinsmithd.trainer.engines.reference import ReferenceEngine

        return ReferenceEngine(load_base(base_model, dtype=dtype, on_progress=on_progress))
    if name == "deepspeed":
        on_progress("starting DeepSpeed")
        from tinsmithd.trainer.engines import distributed

        distributed.init()  # before loading: it chooses this rank's device
        from tinsmithd.trainer.engines.deepspeed_engine import DeepSpeedEngine

        base = load_base(base_model, dtype=dtype, on_progress=on_progress)
        return DeepSpeedEngine(
            base, zero_stage=zero_stage, micro_batch_tokens_max=micro_batch_tokens_max
        )
    raise ValueError(f"no engine {name!r}")

"""Makes training engines by name and tuning."""

from collections.abc import Callable, Mapping
from functools import partial

from tinsmithd.domain import Tuning
from tinsmithd.modeling.base import BaseModel, load_base
from tinsmithd.modeling.weights import FUSED_WEIGHTS, WEIGHTS, MakeWeights
from tinsmithd.trainer.engines.interface import TrainingEngine
from tinsmithd.trainer.engines.registry import EngineMakers

TRAINED_DTYPE = "float32"
"""Dtype of trained weights, whatever dtype frozen weights have."""


def engine_makers(
    name: str,
    base_model: str,
    *,
    dtype: str,
    zero_stage: int,
    offload: bool = False,
    gathered_bytes_max: int = 0,
    micro_batch_tokens_max: int = 2048,
    resident_models_max: int = 16,
    activation_bytes_max: int = 0,
    on_progress: Callable[[str], None],
) -> EngineMakers:
    """Functions that load a base model into an engine, by tuning.

    They raise what `load_base` raises. The reference engine takes the first two settings only,
    since it computes one datum at a time in one process.

    Args:
        name: "deepspeed" or "reference".
        base_model: Hugging Face name or folder.
        dtype: "float32" or "bfloat16", of the frozen weights under adapters.
        zero_stage: 0 to 3.
        offload: Keep optimizer states, and a partitioned base, in host memory.
        gathered_bytes_max: See `ZeroConfig`.
        micro_batch_tokens_max: Maximum tokens computed together.
        resident_models_max: Maximum models on the device at once; others wait in host memory.
        activation_bytes_max: Maximum bytes kept for the backward pass; 0 takes half of what is
            free.
        on_progress: Takes a line for a person now and then.

    Raises:
        ValueError: There is no such engine.
    """
    on_progress("loading torch and transformers")

    def load(tuning: type[Tuning]) -> BaseModel:
        held_in = dtype if tuning.is_adapter else TRAINED_DTYPE
        return load_base(base_model, dtype=held_in, on_progress=on_progress)

    if name == "reference":
        from tinsmithd.trainer.engines.reference import ReferenceEngine

        def make_reference(tuning: type[Tuning], make_weights: MakeWeights) -> TrainingEngine:
            base = load(tuning)
            return ReferenceEngine(base, make_weights(base))

        return _makers(WEIGHTS, make_reference)
    if name == "deepspeed":
        on_progress("starting DeepSpeed")
        from tinsmithd.trainer.process_group import distributed

        distributed.init()  # before loading: it chooses this rank's device
        from tinsmithd.trainer.engines.deepspeed.engine import DeepSpeedEngine
        from tinsmithd.trainer.engines.deepspeed.zero_adapter import ZeroConfig

        def make_deepspeed(tuning: type[Tuning], make_weights: MakeWeights) -> TrainingEngine:
            return DeepSpeedEngine(
                load(tuning),
                make_weights,
                changes_base=not tuning.is_adapter,
                zero=ZeroConfig(zero_stage, offload, gathered_bytes_max),
                micro_batch_tokens_max=micro_batch_tokens_max,
                resident_models_max=resident_models_max,
                activation_bytes_max=activation_bytes_max,
            )

        return _makers(FUSED_WEIGHTS, make_deepspeed)
    raise ValueError(f"no engine {name!r}")


def _makers(
    weights: Mapping[type[Tuning], MakeWeights],
    make: Callable[[type[Tuning], MakeWeights], TrainingEngine],
) -> EngineMakers:
    return {tuning: partial(make, tuning, of_base) for tuning, of_base in weights.items()}

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
    offload: bool = False,
    gathered_bytes_max: int = 0,
    micro_batch_tokens_max: int = 2048,
    resident_models_max: int = 16,
    activation_bytes_max: int = 0,
    on_progress: Callable[[str], None],
) -> TrainingEngine:
    """Load a base model into an engine.

    The reference engine takes the first two settings only: it has one process and one datum.

    Args:
        name: "deepspeed" or "reference".
        base_model: Hugging Face name or folder.
        dtype: "float32" or "bfloat16".
        zero_stage: 0 to 3.
        offload: Keep optimizer states, and a partitioned base, in host memory.
        gathered_bytes_max: See `ZeroConfig`.
        micro_batch_tokens_max: Tokens computed together.
        resident_models_max: Models on the device at once; others wait in host memory.
        activation_bytes_max: What may be kept for the way back; 0 takes half of what is free.
        on_progress: Takes a line for a person now and then.

    Raises:
        NotFound: See `load_base`.
        ValueError: There is no such engine.
    """
    on_progress("loading torch and transformers")
    if name == "reference":
        from tinsmithd.trainer.engines.reference import ReferenceEngine

        return ReferenceEngine(load_base(base_model, dtype=dtype, on_progress=on_progress))
    if name == "deepspeed":
        on_progress("starting DeepSpeed")
        from tinsmithd.trainer.engines import distributed

        distributed.init()  # before loading: it chooses this rank's device
        from tinsmithd.trainer.engines.deepspeed_engine import DeepSpeedEngine
        from tinsmithd.trainer.engines.zero_adapter import ZeroConfig

        return DeepSpeedEngine(
            load_base(base_model, dtype=dtype, on_progress=on_progress),
            zero=ZeroConfig(zero_stage, offload, gathered_bytes_max),
            micro_batch_tokens_max=micro_batch_tokens_max,
            resident_models_max=resident_models_max,
            activation_bytes_max=activation_bytes_max,
        )
    raise ValueError(f"no engine {name!r}")

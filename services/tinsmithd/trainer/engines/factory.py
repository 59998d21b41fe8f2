"""Makes a training engine by name."""

from collections.abc import Callable

from tinsmithd.modeling.base import BaseModel, load_base
from tinsmithd.trainer.engines.switching import SwitchingEngine

FULL_DTYPE = "float32"
"""What a model that trains all weights holds them in, whatever adapters stand on."""


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
) -> SwitchingEngine:
    """Load a base model into an engine.

    The reference engine takes the first two settings only: it has one process and one datum.

    Args:
        name: "deepspeed" or "reference".
        base_model: Hugging Face name or folder.
        dtype: "float32" or "bfloat16": what the frozen weights under adapters are held in.
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

    def load(dtype: str) -> BaseModel:
        return load_base(base_model, dtype=dtype, on_progress=on_progress)

    if name == "reference":
        from tinsmithd.modeling.full import FullWeights
        from tinsmithd.trainer.engines.reference import ReferenceEngine

        def full_reference() -> ReferenceEngine:
            base = load(FULL_DTYPE)
            return ReferenceEngine(base, FullWeights(base))

        return SwitchingEngine(lambda: ReferenceEngine(load(dtype)), full_reference)
    if name == "deepspeed":
        on_progress("starting DeepSpeed")
        from tinsmithd.trainer.process_group import distributed

        distributed.init()  # before loading: it chooses this rank's device
        from tinsmithd.trainer.engines.deepspeed.engine import DeepSpeedEngine
        from tinsmithd.trainer.engines.deepspeed.zero_adapter import ZeroConfig

        def make(dtype: str, *, full: bool) -> DeepSpeedEngine:
            return DeepSpeedEngine(
                load(dtype),
                zero=ZeroConfig(zero_stage, offload, gathered_bytes_max),
                micro_batch_tokens_max=micro_batch_tokens_max,
                resident_models_max=resident_models_max,
                activation_bytes_max=activation_bytes_max,
                full=full,
            )

        return SwitchingEngine(lambda: make(dtype, full=False), lambda: make(FULL_DTYPE, full=True))
    raise ValueError(f"no engine {name!r}")

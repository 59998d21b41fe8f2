"""Makes training engines by their settings and tuning."""

from collections.abc import Callable, Mapping
from functools import partial

from tinsmithd.config import ConfigError, TrainerConfig
from tinsmithd.domain import Tuning
from tinsmithd.modeling.base import BaseModel, Keep, load_base, read_config
from tinsmithd.modeling.weights import FUSED_WEIGHTS, WEIGHTS, MakeWeights
from tinsmithd.sizes import NO_WORK, Unreadable, Work, architecture_of
from tinsmithd.trainer import progress
from tinsmithd.trainer.compute.spread import problem
from tinsmithd.trainer.engines.interface import TrainingEngine
from tinsmithd.trainer.engines.registry import EngineMakers

TRAINED_DTYPE = "float32"
"""Dtype of trained weights, whatever dtype frozen weights have."""


def engine_makers(config: TrainerConfig, on_progress: Callable[[str], None]) -> EngineMakers:
    """Functions that load a base model into an engine, by tuning.

    They raise what `load_base` raises. The reference engine takes `base_model` and `dtype` only,
    since it computes one datum at a time in one process.

    Args:
        config: Says which engine, and its settings.
        on_progress: Takes a line for a person now and then.
    """
    on_progress("loading torch and transformers")

    def say(message: str) -> None:
        progress.made()
        on_progress(message)

    def load(tuning: type[Tuning], keep: Keep | None = None) -> BaseModel:
        held_in = config.dtype if tuning.is_adapter else TRAINED_DTYPE
        base = load_base(config.base_model, dtype=held_in, on_progress=say, keep=keep)
        progress.count_layers(base.model.model.layers)
        return base

    if config.engine == "reference":
        from tinsmithd.trainer.engines.reference import ReferenceEngine

        def make_reference(tuning: type[Tuning], make_weights: MakeWeights) -> TrainingEngine:
            base = load(tuning)
            return ReferenceEngine(base, make_weights(base))

        return _makers(WEIGHTS, make_reference)
    on_progress("starting DeepSpeed")
    from tinsmithd.trainer.compute.determinism import Determinism, prepare
    from tinsmithd.trainer.process_group import distributed

    prepare()
    distributed.init()  # before loading: it chooses this rank's device
    from tinsmithd.trainer.engines.deepspeed.engine import DeepSpeedEngine
    from tinsmithd.trainer.engines.deepspeed.zero_adapter import ZeroConfig
    from tinsmithd.trainer.engines.deepspeed.zero_base import share

    check_ranks(config.sequence_parallel, distributed.rank_and_world_size()[1])
    zero = ZeroConfig(config.zero_stage, config.offload, config.gathered_bytes_max)
    keep = share(zero) if zero.stage == 3 else None
    determinism = Determinism(config.deterministic)

    def make_deepspeed(tuning: type[Tuning], make_weights: MakeWeights) -> TrainingEngine:
        base = load(tuning, keep)
        check_heads(config.sequence_parallel, base)
        return DeepSpeedEngine(
            base,
            make_weights,
            changes_base=not tuning.is_adapter,
            zero=zero,
            micro_batch_tokens_max=config.micro_batch_tokens_max,
            share_prefixes=config.share_prefixes,
            sequence_parallel=config.sequence_parallel,
            resident_models_max=config.resident_models_max,
            activation_bytes_max=config.activation_bytes_max,
            determinism=determinism,
        )

    return _makers(FUSED_WEIGHTS, make_deepspeed)


def check_ranks(sequence_parallel: int, world_size: int) -> None:
    """Refuse a number of ranks that cannot be cut into groups of neighbours.

    Raises:
        ConfigError: See above.
    """
    if world_size % sequence_parallel:
        message = f"is {sequence_parallel}, which does not divide the {world_size} rank(s)"
        raise ConfigError(f"trainer.sequence_parallel: {message} of the group")


def check_heads(sequence_parallel: int, base: BaseModel) -> None:
    """Refuse a model whose heads so many ranks cannot share.

    Raises:
        ConfigError: See above.
    """
    if why := problem(base.model.config, sequence_parallel):
        raise ConfigError(f"trainer.sequence_parallel: {base.info.name}: {why}")


def _makers(
    weights: Mapping[type[Tuning], MakeWeights],
    make: Callable[[type[Tuning], MakeWeights], TrainingEngine],
) -> EngineMakers:
    return {tuning: partial(make, tuning, of_base) for tuning, of_base in weights.items()}


def work_of(base_model: str) -> Work:
    """What a token of a base model costs, which was loaded before; nothing where that is not known.

    Raises:
        NotFound: There is no such model.
    """
    try:
        return Work.of(architecture_of(read_config(base_model).to_dict(), base_model))
    except Unreadable:
        return NO_WORK

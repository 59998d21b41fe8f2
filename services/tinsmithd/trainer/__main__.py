"""`python -m tinsmithd.trainer`: one rank; `torchrun -m tinsmithd.trainer`: several."""

import logging
import sys

from tinsmithd.config import TrainerConfig
from tinsmithd.errors import TinsmithError
from tinsmithd.process import load_or_exit, set_up

EXIT_HOPELESS = 78
"""A restart cannot help (EX_CONFIG of sysexits.h)."""

_log = logging.getLogger(__name__)


def _serve(config: TrainerConfig) -> None:
    # Heavy imports come after the settings were checked.
    import torch

    from tinsmithd.trainer import link
    from tinsmithd.trainer.commands import Commands
    from tinsmithd.trainer.engines import distributed
    from tinsmithd.trainer.engines.factory import make_engine

    if config.threads:
        torch.set_num_threads(config.threads)
    rank, world_size = distributed.rank_and_world_size()
    loading = link.LoadingLink(config.training_target) if rank == 0 else None

    def on_progress(message: str) -> None:
        if loading is not None:
            loading.say(message)

    engine = make_engine(
        config.engine,
        config.base_model,
        dtype=config.dtype,
        zero_stage=config.zero_stage,
        micro_batch_tokens_max=config.micro_batch_tokens_max,
        on_progress=on_progress,
    )
    commands = Commands(engine, world_size=world_size)
    if loading is None:
        link.follow(commands, distributed.broadcast_bytes)
        return
    loading.close()
    greeting = link.hello(engine, config.engine, world_size)
    link.lead(commands, config.training_target, greeting, distributed.broadcast_bytes)


def main() -> None:
    """Run one rank until it is ended."""
    config = load_or_exit(TrainerConfig, EXIT_HOPELESS)
    set_up(config)
    try:
        _serve(config)
    except TinsmithError as error:
        _log.error("%s", error.message)
        sys.exit(EXIT_HOPELESS)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

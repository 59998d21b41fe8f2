"""`python -m tinsmithd.training`: the Training server as a process."""

from tinsmithd.config import ConfigError, TrainingConfig
from tinsmithd.processes import give_up, keep_freed_memory, load_or_exit, run, set_up
from tinsmithd.training.journal import Fenced, StoreDamaged
from tinsmithd.training.ranks.launcher import LaunchError
from tinsmithd.training.server import TrainingServer


async def _serve(config: TrainingConfig) -> None:
    server = TrainingServer(config)
    await server.start()
    await server.run()


def main() -> None:
    """Serve until a signal."""
    config = load_or_exit(TrainingConfig)
    set_up(config)
    keep_freed_memory()
    try:
        run(lambda: _serve(config), config.section)
    except (ConfigError, LaunchError, StoreDamaged) as error:
        give_up(config.section, error)
    except Fenced:
        give_up(config.section, "another Training server has taken over")


if __name__ == "__main__":
    main()

"""`python -m tinsmithd.training`: the Training server as a process."""

import sys

from tinsmithd.config import TrainingConfig
from tinsmithd.process import keep_freed_memory, load_or_exit, run, set_up
from tinsmithd.training.launcher import LaunchError
from tinsmithd.training.records import Fenced, StoreDamaged
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
        run(lambda: _serve(config))
    except (LaunchError, StoreDamaged) as error:
        sys.exit(f"tinsmithd.training: {error}")
    except Fenced:
        sys.exit("tinsmithd.training: another Training server has taken over")


if __name__ == "__main__":
    main()

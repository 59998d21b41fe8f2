"""`python -m tinsmithd.checkpoint`: the Checkpoint server as a process."""

import sys

from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.checkpoint.store import StoreBusy
from tinsmithd.config import CheckpointConfig, ConfigError
from tinsmithd.process import run, set_up


async def _serve(config: CheckpointConfig) -> None:
    server = CheckpointServer(config)
    await server.start()
    await server.run()


def main() -> None:
    """Serve until a signal."""
    try:
        config = CheckpointConfig.load()
    except ConfigError as error:
        sys.exit(f"tinsmithd.checkpoint: {error}")
    set_up(config)
    try:
        run(lambda: _serve(config))
    except StoreBusy as error:
        sys.exit(f"tinsmithd.checkpoint: {error}")


if __name__ == "__main__":
    main()

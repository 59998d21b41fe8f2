"""`python -m tinsmithd.checkpoint`: the Checkpoint server as a process."""

from tinsmithd.checkpoint.catalogue import CatalogueUnusable
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.checkpoint.store import StoreBusy
from tinsmithd.config import CheckpointConfig
from tinsmithd.processes import give_up, load_or_exit, run, set_up


async def _serve(config: CheckpointConfig) -> None:
    server = CheckpointServer(config)
    await server.start()
    await server.run()


def main() -> None:
    """Serve until a signal."""
    config = load_or_exit(CheckpointConfig)
    set_up(config)
    try:
        run(lambda: _serve(config), config.section)
    except (StoreBusy, CatalogueUnusable) as error:
        give_up(config.section, error)


if __name__ == "__main__":
    main()

"""`python -m tinsmithd.sampler`: a Sampler as a process."""

import sys

from tinsmithd.config import ConfigError, SamplerConfig
from tinsmithd.errors import TinsmithError
from tinsmithd.process import run, set_up
from tinsmithd.sampler.server import SamplerServer


async def _serve(config: SamplerConfig) -> None:
    server = SamplerServer(config)
    await server.start()
    await server.run()


def main() -> None:
    """Serve until a signal."""
    try:
        config = SamplerConfig.load()
    except ConfigError as error:
        sys.exit(f"tinsmithd.sampler: {error}")
    set_up(config)
    try:
        run(lambda: _serve(config))
    except TinsmithError as error:
        sys.exit(f"tinsmithd.sampler: {error.message}")


if __name__ == "__main__":
    main()

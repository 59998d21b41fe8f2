"""`python -m tinsmithd.sampler`: a Sampler as a process."""

from tinsmithd.config import SamplerConfig
from tinsmithd.errors import TinsmithError
from tinsmithd.processes import give_up, load_or_exit, run, set_up
from tinsmithd.sampler.server import SamplerServer


async def _serve(config: SamplerConfig) -> None:
    server = SamplerServer(config)
    await server.start()
    await server.run()


def main() -> None:
    """Serve until a signal."""
    config = load_or_exit(SamplerConfig)
    set_up(config)
    try:
        run(lambda: _serve(config), config.section)
    except TinsmithError as error:
        give_up(config.section, error.message)


if __name__ == "__main__":
    main()

"""`python -m tinsmithd.sampler`: a Sampler as a process."""

from tinsmithd.config import ConfigError, SamplerConfig
from tinsmithd.errors import TinsmithError
from tinsmithd.processes import serve
from tinsmithd.sampler.server import SamplerServer

if __name__ == "__main__":
    serve(SamplerConfig, SamplerServer, TinsmithError, ConfigError)

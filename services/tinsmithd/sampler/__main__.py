"""`python -m tinsmithd.sampler`: a Sampler as a process."""

import sys

from tinsmithd.config import SamplerConfig
from tinsmithd.errors import TinsmithError
from tinsmithd.processes import serve
from tinsmithd.processes.event_loop import EventLoop
from tinsmithd.sampler.server import SamplerServer

SWITCH_INTERVAL_S = 0.001
"""How long one thread may keep the interpreter from another: the one that computes and the one that
answers both need it often and shortly. Python's own 5 ms would add up."""

if __name__ == "__main__":
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    serve(SamplerConfig, SamplerServer, TinsmithError, new_loop=EventLoop)

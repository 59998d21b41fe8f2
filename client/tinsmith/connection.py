"""The client's connection to a cluster, for a program that stands between clients and servers.

It finds the servers, spreads calls over Samplers, and sends a call again where the contract says
that the same call may be sent again. Its coroutines run on one event loop, the caller's.
"""

from tinsmith._connection import CHECKPOINT, SAMPLER, TRAINING, Connection
from tinsmith._lane import USES_NUMBER, WINDOW
from tinsmith._replicas import Work

__all__ = ["CHECKPOINT", "SAMPLER", "TRAINING", "USES_NUMBER", "WINDOW", "Connection", "Work"]

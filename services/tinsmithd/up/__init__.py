"""`tinsmith up`: a whole cluster on one machine, each server a process of its own."""

from tinsmithd.up.command import main
from tinsmithd.up.embedded import SERVICES, EmbeddedCluster, Options, UpError

__all__ = ["SERVICES", "EmbeddedCluster", "Options", "UpError", "main"]

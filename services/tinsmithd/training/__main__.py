"""`python -m tinsmithd.training`: the Training server as a process."""

from tinsmithd.config import TrainingConfig
from tinsmithd.processes import keep_freed_memory, serve
from tinsmithd.training.journal import Fenced, StoreDamaged
from tinsmithd.training.ranks.launcher import LaunchError
from tinsmithd.training.server import TrainingServer

if __name__ == "__main__":
    keep_freed_memory()
    hopeless = (LaunchError, StoreDamaged, Fenced)
    serve(TrainingConfig, TrainingServer, *hopeless)

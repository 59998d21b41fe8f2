"""`python -m tinsmithd.checkpoint`: the Checkpoint server as a process."""

from tinsmithd.checkpoint.catalogue import CatalogueUnusable
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.checkpoint.store import StoreBusy, StoreUnusable
from tinsmithd.config import CheckpointConfig
from tinsmithd.processes import serve

if __name__ == "__main__":
    serve(CheckpointConfig, CheckpointServer, StoreBusy, StoreUnusable, CatalogueUnusable)

"""`python -m tinsmithd.checkpoint`: the Checkpoint server as a process."""

import uvloop

from tinsmithd.checkpoint.catalogue import CatalogueUnusable
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.checkpoint.store import StoreBusy, StoreUnusable
from tinsmithd.config import CheckpointConfig
from tinsmithd.processes import serve

if __name__ == "__main__":
    hopeless = (StoreBusy, StoreUnusable, CatalogueUnusable)
    serve(CheckpointConfig, CheckpointServer, *hopeless, new_loop=uvloop.new_event_loop)

"""What checkpoints exist, who may write them, and until when they live: one SQLite file."""

from tinsmithd.checkpoint.catalogue.catalogue import Catalogue, check_repeat
from tinsmithd.checkpoint.catalogue.failures import catalogue_errors
from tinsmithd.checkpoint.catalogue.record import Checkpoint, Ephemeral
from tinsmithd.checkpoint.catalogue.schema import CatalogueUnusable, digest_of
from tinsmithd.checkpoint.catalogue.writers import EPOCH_STEP_MAX, Writer

__all__ = [
    "EPOCH_STEP_MAX",
    "Catalogue",
    "CatalogueUnusable",
    "Checkpoint",
    "Ephemeral",
    "Writer",
    "catalogue_errors",
    "check_repeat",
    "digest_of",
]

"""What checkpoints exist, who may write them, and until when they live: one SQLite file each."""

from tinsmithd.checkpoint.catalogue.catalogue import Catalogue, open_local
from tinsmithd.checkpoint.catalogue.failures import catalogue_errors
from tinsmithd.checkpoint.catalogue.file import CatalogueUnusable
from tinsmithd.checkpoint.catalogue.offline import CatalogueBusy, blobs_in, copy_catalogue
from tinsmithd.checkpoint.catalogue.record import Checkpoint, Ephemeral, read
from tinsmithd.checkpoint.catalogue.refusals import check_repeat, check_stored
from tinsmithd.checkpoint.catalogue.schema import digest_of
from tinsmithd.checkpoint.catalogue.shared import SharedTransactions
from tinsmithd.checkpoint.catalogue.transactions import LocalTransactions, News
from tinsmithd.checkpoint.catalogue.writers import EPOCH_STEP_MAX, Writer

__all__ = [
    "EPOCH_STEP_MAX",
    "Catalogue",
    "CatalogueBusy",
    "CatalogueUnusable",
    "Checkpoint",
    "Ephemeral",
    "LocalTransactions",
    "News",
    "SharedTransactions",
    "Writer",
    "blobs_in",
    "catalogue_errors",
    "check_repeat",
    "check_stored",
    "copy_catalogue",
    "digest_of",
    "open_local",
    "read",
]
